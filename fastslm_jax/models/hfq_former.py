"""HFQ-Former: compresses the encoder features of one window to a few speech tokens.

The paper (arXiv 2601.06199) calls it Hierarchical Frame Querying Transformer in v1 and v2, and
Hierarchical Temporal Abstractor (HTA) in v3. Learned queries read each of three levels of features
X1, X2, X3, each half as long as the one before. The results are distilled to `compression_size`
tokens, which then attend to all three levels to recover detail. Windows do not attend to each
other.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import Attention, Conv, LayerNorm, gelu, sinusoid_init, split_heads
from fastslm_jax.models.lora import Projection


class Compressor(nn.Module):
    """Learned queries attend to a context: [b, context, d] → [b, num_queries, d].

    There are no query, key or value projections and no residual connection.
    """

    num_queries: int
    num_heads: int
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, context, width = x.shape
        query = self.param("query", nn.initializers.normal(0.02), (self.num_queries, width))
        query = LayerNorm(dtype=self.dtype, name="query_norm")(query)
        positions = self.param("query_positions", sinusoid_init, (self.num_queries, width))
        query = query + positions.astype(self.dtype)
        value = LayerNorm(dtype=self.dtype, name="context_norm")(x)
        positions = self.param("context_positions", sinusoid_init, (context, width))
        key = value + positions.astype(self.dtype)
        query = jnp.broadcast_to(query, (batch, *query.shape))
        heads = (split_heads(y, self.num_heads) for y in (query, key, value))
        out = self.attention_kernel(*heads).reshape(query.shape)
        return Projection(width, use_bias=True, dtype=self.dtype, name="out")(out)


class Downsampler(nn.Module):
    """Halves the frame rate: [b, t, d] → [b, ceil(t / 2), d]."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = gelu(Conv(width, dtype=self.dtype, name="conv1")(x))
        x = gelu(Conv(width, stride=2, dtype=self.dtype, name="conv2")(x))
        return LayerNorm(dtype=self.dtype, name="norm")(x)


class DetailRecovery(nn.Module):
    """Self-attention, then cross-attention to the unnormalized features of all levels; no MLP."""

    num_heads: int
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, features: jax.Array) -> jax.Array:
        self_attention, cross_attention = (
            Attention(self.num_heads, self.attention_kernel, dtype=self.dtype, name=name)
            for name in ("self_attention", "cross_attention")
        )
        x = x + self_attention(LayerNorm(dtype=self.dtype, name="self_norm")(x))
        return x + cross_attention(LayerNorm(dtype=self.dtype, name="cross_norm")(x), features)


class HFQFormer(nn.Module):
    """Encoder features [b, t, d] → speech tokens [b, compression_size, output_width].

    Results of every stage are sown into the collection `intermediates`.

    stage_tokens: number of queries per level.
    """

    output_width: int
    stage_tokens: Sequence[int] = (80, 80, 80)
    compression_size: int = 50
    detail_recovery_layers: int = 2
    head_dim: int = 64
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[-1]
        if width % self.head_dim:
            raise ValueError(
                f"encoder width {width} is not a multiple of the HFQ-Former's head_dim "
                f"{self.head_dim}"
            )
        num_heads = width // self.head_dim

        def compressor(num_queries: int, name: str) -> Compressor:
            return Compressor(
                num_queries, num_heads, self.attention_kernel, dtype=self.dtype, name=name
            )

        levels = [features.astype(self.dtype)]
        for level in range(1, len(self.stage_tokens)):
            levels.append(Downsampler(dtype=self.dtype, name=f"downsampler_{level}")(levels[-1]))
            self.sow("intermediates", f"stage{level}_features", levels[-1])
        stages = []
        for level, num_queries in enumerate(self.stage_tokens, start=1):
            stages.append(compressor(num_queries, f"compressor_{level}")(levels[level - 1]))
            self.sow("intermediates", f"stage{level}_tokens", stages[-1])

        distillation = compressor(self.compression_size, "semantic_distillation")
        tokens = distillation(jnp.concatenate(stages, axis=1))
        self.sow("intermediates", "semantic_tokens", tokens)
        all_levels = jnp.concatenate(levels, axis=1)
        for layer in range(self.detail_recovery_layers):
            recovery = DetailRecovery(
                num_heads, self.attention_kernel, dtype=self.dtype, name=f"detail_recovery_{layer}"
            )
            tokens = recovery(tokens, all_levels)
            self.sow("intermediates", f"detail_recovery_{layer}_tokens", tokens)
        projection = Projection(
            self.output_width, use_bias=True, dtype=self.dtype, name="projection"
        )
        return projection(tokens)
