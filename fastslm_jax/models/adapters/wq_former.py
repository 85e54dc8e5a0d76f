"""A Q-Former for each short window of frames.

SALMONN (arXiv 2310.13289; its public code has 2 layers) divides the features into windows of 0.33 s
and reads each with the same Q-Former of one query: 88 tokens for 30 s, in temporal order. Here the
short windows are as long as the token rate requires: 0.6 s for 50 tokens. A single query needs no
self-attention (in the original, the queries and keys of its self-attention have no effect).
"""

from fastslm_jax.models.adapters.base import frames_per_token
from fastslm_jax.models.adapters.sq_former import SQFormer


class WQFormer(SQFormer):
    """One query reads each equal part of the window; all parts share the parameters."""

    def parts(self, frames: int) -> int:
        return frames // frames_per_token(frames, self.compression_size)
