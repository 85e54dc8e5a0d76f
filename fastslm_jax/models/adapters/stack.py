"""Frame stacking and a multilayer perceptron.

Voxtral (arXiv 2507.13264; `VoxtralMultiModalProjector` of transformers) concatenates 4 encoder
frames, which gives 12.5 tokens a second, and applies two linear layers with a GELU between them.
Here more frames are concatenated, for the token rate of the other adapters, and the layers have
biases.
"""

import jax

from fastslm_jax.models.adapters.base import MLPAdapter


class Stack(MLPAdapter):
    """Each token is computed from the concatenation of its equal part of the frames."""

    def gather(self, features: jax.Array, span: int) -> jax.Array:
        windows, _, width = features.shape
        return features.reshape(windows, -1, span * width)

    def inputs(self, span: int, width: int) -> int:
        return span * width
