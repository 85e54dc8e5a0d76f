"""Qwen3 decoder (arXiv 2505.09388) with LoRA and an explicit key-value cache.

Shapes: b batch, t new tokens, s cache slots, n query heads, k key-value heads, h head dimension, d width, v vocabulary.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.models.attention import AttentionKernel, CausalSegments
from fastslm_jax.models.kv_cache import KVCache
from fastslm_jax.models.layers import remat
from fastslm_jax.models.lora import LoRA, Projection


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding. `factor` above 1 is YaRN (arXiv 2309.00071) as `transformers` computes it."""

    theta: float = 1_000_000.0
    factor: float = 1.0
    original_max_positions: int = 32_768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def inverse_frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Frequencies [head_dim / 2] in float32, and the factor on the cosines and sines."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = (1.0 / np.power(np.float32(self.theta), exponents, dtype=np.float32)).astype(
            np.float32
        )
        if self.factor == 1.0:
            return frequencies, 1.0

        def correction_dim(rotations: float) -> float:
            return (
                head_dim
                * math.log(self.original_max_positions / (rotations * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low = max(math.floor(correction_dim(self.beta_fast)), 0)
        high = min(math.ceil(correction_dim(self.beta_slow)), head_dim - 1)
        ramp = np.clip(
            (np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1
        )
        extrapolated = 1 - ramp
        frequencies = frequencies / self.factor * (1 - extrapolated) + frequencies * extrapolated
        scale = (
            self.attention_factor
            if self.attention_factor is not None
            else 0.1 * math.log(self.factor) + 1.0
        )
        return frequencies.astype(np.float32), scale

    def __call__(self, x: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Rotates x [b, t, n, h] by position_ids [b, t]; the two halves of h are the pairs. Computed in float32."""
        frequencies, scale = self.inverse_frequencies(x.shape[-1])
        angles = position_ids[:, :, None, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate(
            [first * cos - second * sin, second * cos + first * sin], axis=-1
        ).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class DecoderBlock(nn.Module):
    """Pre-norm block: grouped-query attention with normalised queries and keys, then SwiGLU."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope: RoPE
    epsilon: float
    lora: LoRA
    deterministic: bool
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, carry, position_ids, mask, lora_gate):
        """carry: x [b, t, d], and the cache or None; mask None with a cache → (x, cache), None."""
        x, cache = carry
        width = x.shape[-1]

        def project(features, name):
            layer = Projection(features, lora=self.lora, dtype=self.dtype, name=name)
            return lambda y: layer(y, lora_gate, self.deterministic)

        def heads(y, count):
            return y.reshape(*y.shape[:-1], count, self.head_dim)

        hidden = RMSNorm(self.epsilon, self.dtype, name="attention_norm")(x)
        query = heads(project(self.num_heads * self.head_dim, "query")(hidden), self.num_heads)
        key = heads(project(self.num_kv_heads * self.head_dim, "key")(hidden), self.num_kv_heads)
        value = heads(
            project(self.num_kv_heads * self.head_dim, "value")(hidden), self.num_kv_heads
        )
        query = self.rope(RMSNorm(self.epsilon, self.dtype, name="query_norm")(query), position_ids)
        key = self.rope(RMSNorm(self.epsilon, self.dtype, name="key_norm")(key), position_ids)
        if cache is None:
            out = self.attend(query, key, value, mask)
        else:
            out, cache = cache.attend(query, key, value, position_ids)
        x = x + project(width, "out")(out.reshape(*out.shape[:-2], self.num_heads * self.head_dim))

        hidden = RMSNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        hidden = jax.nn.silu(project(self.mlp_dim, "gate")(hidden)) * project(self.mlp_dim, "up")(
            hidden
        )
        return (x + project(width, "down")(hidden), cache), None


class Qwen3(nn.Module):
    """Any dense Qwen3. Embeddings go in and hidden states come out, so that speech can be spliced between."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope: RoPE = RoPE()
    epsilon: float = 1e-6
    tied_embeddings: bool = True
    lora: LoRA = LoRA()
    deterministic: bool = True  # False: LoRA dropout acts, and apply() needs rngs={"dropout": …}
    remat: str = "none"  # see `layers.remat`
    scan_layers: bool = True
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.embed_tokens = self.param(
            "embed_tokens", nn.initializers.normal(0.02), (self.vocab_size, self.width)
        )
        if not self.tied_embeddings:
            self.lm_head = self.param(
                "lm_head", nn.initializers.normal(0.02), (self.vocab_size, self.width)
            )
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.mlp_dim)
        options = (self.rope, self.epsilon, self.lora, self.deterministic, self.attend, self.dtype)
        stack = nn.scan(
            remat(DecoderBlock, self.remat, self.scan_layers),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.num_layers,
            unroll=1 if self.scan_layers else self.num_layers,
        )
        self.layers = stack(*sizes, *options)
        self.final_norm = RMSNorm(self.epsilon, self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [b, t] → embeddings [b, t, d]."""
        return jnp.take(self.embed_tokens, tokens, axis=0).astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] → float32 logits [..., v]."""
        table = self.embed_tokens if self.tied_embeddings else self.lm_head
        return jnp.einsum(
            "...d,vd->...v", hidden, table.astype(self.dtype), preferred_element_type=jnp.float32
        )

    def __call__(
        self,
        embeddings: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        lora_gate: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Embeddings [b, t, d] → hidden states [b, t, d] after the last norm, and the cache.

        Args:
            position_ids: [b, t]. With a cache, new token i of a row is written to slot position_ids[row, 0] + i.
            segment_ids: [b, t]. Tokens attend within their segment only; each segment is contiguous. Without a cache.
            lora_gate: [b, t] or [b, 1]; 0 switches LoRA off for a token. None: on everywhere.
            cache: see `init_cache`; its slots behind a token are not seen, whatever they hold.
        """
        batch, length = embeddings.shape[:2]
        mask = None
        if cache is None:
            mask = CausalSegments(segment_ids)
        else:
            cache = cache.replace(layer=jnp.int32(0))
        if lora_gate is not None:
            lora_gate = jnp.broadcast_to(lora_gate, (batch, length))
        embeddings = nn.with_logical_constraint(embeddings.astype(self.dtype), ("rows", None, None))
        (hidden, cache), _ = self.layers((embeddings, cache), position_ids, mask, lora_gate)
        return self.final_norm(hidden), cache

    def init_cache(self, batch: int, slots: int, dtype=None) -> KVCache:
        """An empty cache for `slots` positions of `batch` rows; dtype int8 takes half the memory of bfloat16."""
        return KVCache.empty(
            self.num_layers, batch, self.num_kv_heads, slots, self.head_dim, dtype or self.dtype
        )
