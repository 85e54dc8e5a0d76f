"""HFQ-Former: the paper's adapter.

The paper (arXiv 2601.06199) calls it Hierarchical Frame Querying Transformer in v1 and v2, and
Hierarchical Temporal Abstractor (HTA) in v3. Learned queries read each of three levels of features
X1, X2, X3, each half as long as the one before. The results are distilled to `compression_size`
tokens, which then attend to all three levels to recover detail. Windows do not attend to each
other. The number of levels, their ratio of lengths, the recovery layers and the projections of the
compressors can be changed.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastslm_jax.models import query_init
from fastslm_jax.models.adapters.base import Adapter, check_heads
from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import Attention, Conv, LayerNorm, gelu, sinusoid_init, split_heads
from fastslm_jax.models.lora import Projection


class Compressor(nn.Module):
    """Learned queries attend to a context: [b, context, d] → [b, num_queries, d].

    There is no residual connection.

    has_projections: whether queries, keys and values are projected; the authors' are not.
    """

    num_queries: int
    num_heads: int
    has_projections: bool = False
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, context, width = x.shape
        query = self.param("query", nn.initializers.normal(0.02), (self.num_queries, width))
        query = LayerNorm(dtype=self.dtype, name="query_norm")(query)
        positions = self.param("query_positions", sinusoid_init, (self.num_queries, width))
        query = jnp.broadcast_to(query + positions.astype(self.dtype), (batch, *query.shape))
        value = LayerNorm(dtype=self.dtype, name="context_norm")(x)
        positions = self.param("context_positions", sinusoid_init, (context, width))
        key = value + positions.astype(self.dtype)
        if self.has_projections:
            query, key, value = (
                Projection(width, use_bias=True, dtype=self.dtype, name=f"{name}_projection")(y)
                for name, y in (("query", query), ("key", key), ("value", value))
            )
        heads = [split_heads(y, self.num_heads) for y in (query, key, value)]
        self.sow("attention", "query_key", heads[:2])
        out = self.attention_kernel(*heads).reshape(query.shape)
        return Projection(width, use_bias=True, dtype=self.dtype, name="out")(out)


class Downsampler(nn.Module):
    """Divides the frame rate: [b, t, d] → [b, ceil(t / factor), d].

    factor: up to 5, so that the two convolutions of 3 frames read every frame.
    """

    factor: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = gelu(Conv(width, dtype=self.dtype, name="conv1")(x))
        x = gelu(Conv(width, stride=self.factor, dtype=self.dtype, name="conv2")(x))
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


class HFQFormer(Adapter):
    """Encoder features [b, t, d] → speech tokens [b, compression_size, output_width].

    Results of every stage are sown into the collection `intermediates`, queries and keys of every
    attention into the collection `attention`.

    stage_tokens: number of queries per level.
    downsample_factor: ratio of the lengths of successive levels.
    compressor_projections: see `Compressor`.
    """

    GROUP: ClassVar[str] = "hfq_former"

    stage_tokens: Sequence[int] = (80, 80, 80)
    detail_recovery_layers: int = 2
    downsample_factor: int = 2
    compressor_projections: bool = False
    head_dim: int = 64

    def check(self, frames: int, width: int, where: str) -> None:
        check_heads(width, self.head_dim, where)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[-1]
        check_heads(width, self.head_dim, "encoder")
        num_heads = width // self.head_dim

        def compressor(num_queries: int, name: str) -> Compressor:
            return Compressor(
                num_queries,
                num_heads,
                self.compressor_projections,
                self.attention_kernel,
                dtype=self.dtype,
                name=name,
            )

        levels = [features.astype(self.dtype)]
        for level in range(1, len(self.stage_tokens)):
            downsampler = Downsampler(
                self.downsample_factor, dtype=self.dtype, name=f"downsampler_{level}"
            )
            levels.append(downsampler(levels[-1]))
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

    def minimum_flops(self, frames: int, width: int) -> dict[str, int]:
        levels = [frames]
        for _ in self.stage_tokens[1:]:
            levels.append(-(-levels[-1] // self.downsample_factor))
        down = 0
        for level, (before, after) in enumerate(itertools.pairwise(levels)):
            conv1, conv2 = 2 * 3 * before * width * width, 2 * 3 * after * width * width
            down += (3 if level else 2) * conv1 + 3 * conv2

        tokens, compressed = sum(self.stage_tokens), self.compression_size
        compressions = [*zip(self.stage_tokens, levels, strict=True), (compressed, tokens)]
        scores = sum(queries * context for queries, context in compressions)
        outputs = tokens + compressed
        contexts = sum(levels) + tokens
        projected = outputs + 2 * contexts if self.compressor_projections else 0
        compressors = 3 * 2 * (2 * scores * width + (outputs + projected) * width * width)

        features, layers = sum(levels), self.detail_recovery_layers
        # Query, key, value and output of self-attention; query and output of cross-attention.
        projections = 3 * 2 * compressed * 6 * width * width
        key_value = 2 * 2 * (3 * features - levels[0]) * width * width
        attention = 3 * 2 * 2 * compressed * (compressed + features) * width
        return {
            "HFQ-Former downsamplers": down,
            "HFQ-Former compressors": compressors,
            "HFQ-Former detail recovery": layers * (projections + key_value + attention),
            "HFQ-Former projection": 3 * 2 * compressed * width * self.output_width,
        }

    def temporal_init(self, params: Mapping, rng: jax.Array) -> dict:
        return query_init.temporal_query_init(params, rng, self.head_dim)
