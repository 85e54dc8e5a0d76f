"""One Q-Former over the whole window.

Learned queries go through transformer layers that attend to the encoder's features: the Q-Former
of BLIP-2 (arXiv 2301.12597; `Blip2QFormerModel` of transformers). SALMONN (arXiv 2310.13289)
compares its window-level Q-Former with this one. Differences from BLIP-2: layer norms precede the
branches and not follow them, which needs less care in training; the width is the encoder's; and
the features are normalized and get fixed position embeddings.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastslm_jax.errors import UserError
from fastslm_jax.models import query_init
from fastslm_jax.models.adapters.base import Adapter, check_heads, matched_parameters, rounded
from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import Attention, LayerNorm, gelu, sinusoid_init
from fastslm_jax.models.lora import Projection


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention to the context and a perceptron: [b, n, d] → [b, n, d].

    A single query has no self-attention, which would be a linear layer.
    """

    num_heads: int
    mlp_dim: int
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x [b, n, d], context [b, s, d] → [b, n, d]."""
        width = x.shape[-1]
        self_attention, cross_attention = (
            Attention(self.num_heads, self.attention_kernel, dtype=self.dtype, name=name)
            for name in ("self_attention", "cross_attention")
        )
        if x.shape[1] > 1:
            x = x + self_attention(LayerNorm(dtype=self.dtype, name="self_norm")(x))
        x = x + cross_attention(LayerNorm(dtype=self.dtype, name="cross_norm")(x), context)
        hidden = LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        hidden = Projection(self.mlp_dim, use_bias=True, dtype=self.dtype, name="mlp_in")(hidden)
        mlp_out = Projection(width, use_bias=True, dtype=self.dtype, name="mlp_out")
        return x + mlp_out(gelu(hidden))


class SQFormer(Adapter):
    """`compression_size` queries read all frames of the window.

    num_layers: transformer layers.
    mlp_dim: their hidden width; 0 for as many parameters as the HFQ-Former.
    """

    num_layers: int = 2
    mlp_dim: int = 0
    head_dim: int = 64

    def parts(self, frames: int) -> int:
        """Equal parts of a window, whose frames have queries of their own."""
        return 1

    def hidden(self, num_queries: int, width: int) -> int:
        if self.mlp_dim:
            return self.mlp_dim
        layers = matched_parameters(width, self.output_width) - width * self.output_width
        attention = (8 if num_queries > 1 else 4) * width * width  # parameters of a layer
        if layers <= self.num_layers * attention:
            raise UserError(
                f"config.model.qformer_layers={self.num_layers}: their attention has more "
                "parameters than the HFQ-Former; choose fewer, or set config.model.adapter_mlp_dim"
            )
        return rounded((layers / self.num_layers - attention) / (2 * width))

    def check(self, frames: int, width: int, where: str) -> None:
        check_heads(width, self.head_dim, where)
        self.hidden(self.compression_size // self.parts(frames), width)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        windows, frames, width = features.shape
        check_heads(width, self.head_dim, "encoder")
        parts = self.parts(frames)
        num_queries = self.compression_size // parts
        # The blocks of a fused kernel are larger than the few frames of a part.
        kernel = self.attention_kernel if parts == 1 else AttentionKernel()
        context = features.astype(self.dtype).reshape(windows * parts, frames // parts, width)
        context = LayerNorm(dtype=self.dtype, name="context_norm")(context)
        positions = self.param("context_positions", sinusoid_init, context.shape[1:])
        context = context + positions.astype(self.dtype)
        query = self.param("query", nn.initializers.normal(0.02), (num_queries, width))
        x = jnp.broadcast_to(query.astype(self.dtype), (len(context), num_queries, width))
        for layer in range(self.num_layers):
            x = QFormerLayer(
                width // self.head_dim,
                self.hidden(num_queries, width),
                kernel,
                dtype=self.dtype,
                name=f"layer_{layer}",
            )(x, context)
        x = LayerNorm(dtype=self.dtype, name="final_norm")(x)
        projection = Projection(
            self.output_width, use_bias=True, dtype=self.dtype, name="projection"
        )
        return projection(x.reshape(windows, self.compression_size, width))

    def minimum_flops(self, frames: int, width: int) -> dict[str, int]:
        tokens, parts = self.compression_size, self.parts(frames)
        num_queries = tokens // parts
        has_self_attention = num_queries > 1
        # Query and output of cross-attention; query, key, value and output of self-attention.
        projections = (2 + 4 * has_self_attention) * tokens * width * width
        key_value = 2 * frames * width * width
        context = frames // parts + has_self_attention * num_queries
        attention = 2 * tokens * context * width
        perceptron = 2 * tokens * width * self.hidden(num_queries, width)
        layer = 3 * 2 * (projections + key_value + attention + perceptron)
        return {
            "Q-Former layers": self.num_layers * layer,
            "Q-Former projection": 3 * 2 * tokens * width * self.output_width,
        }

    def temporal_init(self, params: Mapping, rng: jax.Array) -> dict:
        return query_init.qformer(params, rng)
