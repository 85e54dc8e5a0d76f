"""Whisper's speech encoder (arXiv 2212.04356): log-mel frames at 100 Hz in, features at 50 Hz out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import Attention, Conv, LayerNorm, gelu, remat, sinusoid_init
from fastslm_jax.models.lora import Projection


class EncoderBlock(nn.Module):
    """Pre-LN transformer block, [b, t, d] → [b, t, d]."""

    num_heads: int
    mlp_dim: int
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        x = x + Attention(self.num_heads, self.attend, dtype=self.dtype, name="attention")(
            LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        )
        hidden = LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        hidden = gelu(
            Projection(self.mlp_dim, use_bias=True, dtype=self.dtype, name="mlp_in")(hidden)
        )
        x = x + Projection(width, use_bias=True, dtype=self.dtype, name="mlp_out")(hidden)
        return x, None


class WhisperEncoder(nn.Module):
    """mel [b, 2·max_positions, num_mels] → [b, max_positions, width]."""

    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_mels: int
    max_positions: int
    remat: str = "none"
    scan_layers: bool = True
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, mel: jax.Array) -> jax.Array:
        if mel.shape[1:] != (2 * self.max_positions, self.num_mels):
            raise ValueError(
                f"mel has frames × bands {mel.shape[1:]}, this encoder takes {(2 * self.max_positions, self.num_mels)}"
            )
        x = gelu(Conv(self.width, dtype=self.dtype, name="conv1")(mel))
        x = gelu(Conv(self.width, stride=2, dtype=self.dtype, name="conv2")(x))
        x = x + self.param("positions", sinusoid_init, (self.max_positions, self.width)).astype(
            self.dtype
        )
        block = remat(EncoderBlock, self.remat, self.scan_layers)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
            unroll=1 if self.scan_layers else self.num_layers,
        )
        x, _ = stack(self.num_heads, self.mlp_dim, self.attend, dtype=self.dtype, name="layers")(x)
        return LayerNorm(dtype=self.dtype, name="final_norm")(x)
