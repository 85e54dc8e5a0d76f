"""The interface of the adapters, and the multilayer perceptron that several of them end with."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastslm_jax import sharding
from fastslm_jax.errors import UserError
from fastslm_jax.models import query_init
from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import gelu
from fastslm_jax.models.lora import Projection


class Adapter(nn.Module):
    """Encoder features [windows, frames, d] → speech tokens [windows, tokens, output_width].

    Tokens are in temporal order, and a window's tokens depend on that window alone. A subclass
    implements `__call__`, `minimum_flops` and `temporal_init`, and checks its sizes in `check`.

    GROUP: name of the adapter's parameters in the parameter tree.
    output_width: width of the language model.
    compression_size: tokens of a window.
    """

    GROUP: ClassVar[str] = "adapter"

    output_width: int
    compression_size: int = 50
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    def check(self, frames: int, width: int, where: str) -> None:
        """Raises UserError if windows of so many frames of this width are not possible.

        Args:
            where: what the encoder is, for error messages.
        """

    def minimum_flops(self, frames: int, width: int) -> dict[str, int]:
        """{term: minimum FLOPs per window}, forward and backward; see docs/performance.md.

        The encoder's features need no gradient.
        """
        raise NotImplementedError

    def temporal_init(self, params: Mapping, rng: jax.Array) -> dict:
        """The initial parameters for `config.model.query_init=temporal`; see `query_init`."""
        raise NotImplementedError


def frames_per_token(frames: int, compression_size: int) -> int:
    """Frames of one token, for adapters that divide a window into equal parts.

    Example: 1500 frames, 50 tokens → 30.

    Raises:
        UserError: the tokens do not divide the frames; names the nearest numbers that do.
    """
    if frames % compression_size:
        nearest = sharding.nearest_divisors(frames, compression_size)
        raise UserError(
            f"config.model.compression_size={compression_size}: this adapter divides the "
            f"{frames} frames of a window into equal parts, one for each token; choose "
            f"{' or '.join(map(str, nearest))}, or config.model.adapter=hfq or sq_former"
        )
    return frames // compression_size


def check_heads(width: int, head_dim: int, where: str) -> None:
    """Raises UserError if attention heads do not divide the encoder's width."""
    if width % head_dim:
        raise UserError(
            f"{where}: the encoder width {width} is not a multiple of {head_dim}, the adapter's "
            "head dimension"
        )


def matched_parameters(width: int, output_width: int) -> int:
    """Parameters of the HFQ-Former with 3 scales and 2 detail recovery layers, but for vectors.

    4 compressors of d², 2 downsamplers of 2·3·d², 2 recovery layers of 8·d², and the projection.
    """
    return 32 * width * width + width * output_width


def rounded(size: float) -> int:
    """A hidden width of at most 6 % more or less, which common mesh sizes divide.

    Example: 14506 → 14592, a multiple of 256; 136 → 128, a multiple of 16.
    """
    step = 1
    while step < 256 and 16 * step <= size:
        step *= 2
    return max(1, round(size / step) * step)


class MLPAdapter(Adapter):
    """Base of adapters that compute each token from its own equal part of the frames.

    A subclass implements `gather`.

    mlp_dim: hidden width; 0 for as many parameters as the HFQ-Former, see `matched_parameters`.
    """

    mlp_dim: int = 0

    def gather(self, features: jax.Array, span: int) -> jax.Array:
        """[windows, tokens · span, d] → [windows, tokens, inputs]."""
        raise NotImplementedError

    def inputs(self, span: int, width: int) -> int:
        """Inputs of the perceptron."""
        raise NotImplementedError

    def hidden(self, inputs: int, width: int) -> int:
        parameters = matched_parameters(width, self.output_width)
        return self.mlp_dim or rounded(parameters / (inputs + self.output_width))

    def check(self, frames: int, width: int, where: str) -> None:
        frames_per_token(frames, self.compression_size)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        _, frames, width = features.shape
        x = self.gather(features, frames_per_token(frames, self.compression_size))
        hidden = self.hidden(x.shape[-1], width)
        x = Projection(hidden, use_bias=True, dtype=self.dtype, name="mlp_in")(x)
        projection = Projection(
            self.output_width, use_bias=True, dtype=self.dtype, name="projection"
        )
        return projection(gelu(x))

    def minimum_flops(self, frames: int, width: int) -> dict[str, int]:
        inputs = self.inputs(frames_per_token(frames, self.compression_size), width)
        hidden, tokens = self.hidden(inputs, width), self.compression_size
        return {"MLP": 2 * tokens * hidden * (2 * inputs + 3 * self.output_width)}

    def temporal_init(self, params: Mapping, rng: jax.Array) -> dict:
        return {**params, "projection": query_init.projection(params["projection"], rng)}
