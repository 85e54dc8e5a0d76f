"""Average pooling and a multilayer perceptron.

Qwen2-Audio (arXiv 2407.10759; `Qwen2AudioEncoder` and `Qwen2AudioMultiModalProjector` of
transformers) averages pairs of encoder frames, which gives 25 tokens a second, and projects them
with one linear layer. Here the averages are over more frames, for the token rate of the other
adapters, and a hidden layer gives it as many parameters.
"""

import jax

from fastslm_jax.models.adapters.base import MLPAdapter


class Pooling(MLPAdapter):
    """Each token is computed from the mean of its equal part of the frames."""

    def gather(self, features: jax.Array, span: int) -> jax.Array:
        windows, _, width = features.shape
        return features.reshape(windows, -1, span, width).mean(axis=2)

    def inputs(self, span: int, width: int) -> int:
        return width
