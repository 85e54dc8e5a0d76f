"""Whisper's speech encoder (arXiv 2212.04356): 100 Hz log-mel frames to 50 Hz features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import Attention, Conv, LayerNorm, gelu, sinusoid_init, stack
from fastslm_jax.models.lora import Projection


class EncoderBlock(nn.Module):
    """Pre-norm transformer block, [b, t, d] → [b, t, d].

    length: number of positions; the rest of the t are padding.
    """

    num_heads: int
    mlp_dim: int
    length: int
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        attention = Attention(
            self.num_heads, self.attention_kernel, dtype=self.dtype, name="attention"
        )
        x = x + attention(LayerNorm(dtype=self.dtype, name="attention_norm")(x), keys=self.length)
        hidden = LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        hidden = Projection(self.mlp_dim, use_bias=True, dtype=self.dtype, name="mlp_in")(hidden)
        hidden = gelu(hidden)
        x = x + Projection(width, use_bias=True, dtype=self.dtype, name="mlp_out")(hidden)
        return x, None


class WhisperEncoder(nn.Module):
    """mel [b, 2·max_positions, num_mels] → [b, max_positions, width].

    remat, scan_layers: see `layers.stack`.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_mels: int
    max_positions: int
    remat: str = "none"
    scan_layers: bool = True
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, mel: jax.Array) -> jax.Array:
        expected = (2 * self.max_positions, self.num_mels)
        if mel.shape[1:] != expected:
            raise ValueError(
                f"mel has shape (frames, bands) = {mel.shape[1:]}; this encoder takes {expected}"
            )
        x = gelu(Conv(self.width, dtype=self.dtype, name="conv1")(mel))
        x = gelu(Conv(self.width, stride=2, dtype=self.dtype, name="conv2")(x))
        positions = self.param("positions", sinusoid_init, (self.max_positions, self.width))
        x = x + positions.astype(self.dtype)
        # Once, instead of before the attention of every layer.
        padding = -self.max_positions % self.attention_kernel.multiple
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        blocks = stack(EncoderBlock, self.num_layers, self.remat, scan_layers=self.scan_layers)
        sizes = (self.num_heads, self.mlp_dim, self.max_positions)
        x, _ = blocks(*sizes, self.attention_kernel, dtype=self.dtype, name="layers")(x)
        return LayerNorm(dtype=self.dtype, name="final_norm")(x[:, : self.max_positions])
