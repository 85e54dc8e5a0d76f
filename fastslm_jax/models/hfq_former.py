"""HFQ-Former (FastSLM v1/v2; called HTA, Hierarchical Temporal Abstractor, in v3): one window of features in, few tokens out.

Three levels of features X1, X2, X3 (each half as long) are each read by learned queries, the results are distilled to
`compression_size` tokens, which then recover detail from all three levels. Windows never see each other.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import Attention, Conv, LayerNorm, gelu, sinusoid_init, split_heads
from fastslm_jax.models.lora import Projection


class Compressor(nn.Module):
    """Learned queries read a context: [b, context, d] → [b, num_queries, d].

    Attention acts straight on the normalised context: there is no query, key or value projection and no residual.
    """

    num_queries: int
    num_heads: int
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, context, width = x.shape
        query = self.param("query", nn.initializers.normal(0.02), (self.num_queries, width))
        query = LayerNorm(dtype=self.dtype, name="query_norm")(query)
        query = query + self.param(
            "query_positions", sinusoid_init, (self.num_queries, width)
        ).astype(self.dtype)
        value = LayerNorm(dtype=self.dtype, name="context_norm")(x)
        key = value + self.param("context_positions", sinusoid_init, (context, width)).astype(
            self.dtype
        )
        query = jnp.broadcast_to(query, (batch, *query.shape))
        out = self.attend(*(split_heads(y, self.num_heads) for y in (query, key, value)))
        return Projection(width, use_bias=True, dtype=self.dtype, name="out")(
            out.reshape(query.shape)
        )


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
    """Tokens attend to each other, then to the features of every level (not normalised). No MLP."""

    num_heads: int
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, features: jax.Array) -> jax.Array:
        x = x + Attention(self.num_heads, self.attend, dtype=self.dtype, name="self_attention")(
            LayerNorm(dtype=self.dtype, name="self_norm")(x)
        )
        hidden = LayerNorm(dtype=self.dtype, name="cross_norm")(x)
        return x + Attention(self.num_heads, self.attend, dtype=self.dtype, name="cross_attention")(
            hidden, features
        )


class HFQFormer(nn.Module):
    """Encoder features [b, t, d] → speech tokens [b, compression_size, output_width].

    Every level's result is sown into the collection `intermediates` under the paper's names.
    """

    output_width: int
    stage_tokens: Sequence[int] = (80, 80, 80)
    compression_size: int = 50
    detail_recovery_layers: int = 2
    head_dim: int = 64
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[-1]
        if width % self.head_dim:
            raise ValueError(
                f"the HFQ-Former has heads of {self.head_dim}, which do not divide the encoder width {width}"
            )
        num_heads = width // self.head_dim

        levels = [features.astype(self.dtype)]
        for level in range(1, len(self.stage_tokens)):
            levels.append(Downsampler(dtype=self.dtype, name=f"downsampler_{level}")(levels[-1]))
            self.sow("intermediates", f"stage{level}_features", levels[-1])
        stages = []
        for level, (num_queries, x) in enumerate(
            zip(self.stage_tokens, levels, strict=True), start=1
        ):
            stages.append(
                Compressor(
                    num_queries,
                    num_heads,
                    self.attend,
                    dtype=self.dtype,
                    name=f"compressor_{level}",
                )(x)
            )
            self.sow("intermediates", f"stage{level}_tokens", stages[-1])

        tokens = Compressor(
            self.compression_size,
            num_heads,
            self.attend,
            dtype=self.dtype,
            name="semantic_distillation",
        )(jnp.concatenate(stages, axis=1))
        self.sow("intermediates", "semantic_tokens", tokens)
        all_levels = jnp.concatenate(levels, axis=1)
        for layer in range(self.detail_recovery_layers):
            tokens = DetailRecovery(
                num_heads, self.attend, dtype=self.dtype, name=f"detail_recovery_{layer}"
            )(tokens, all_levels)
            self.sow("intermediates", f"detail_recovery_{layer}_tokens", tokens)
        return Projection(self.output_width, use_bias=True, dtype=self.dtype, name="projection")(
            tokens
        )
