"""Dense decoders with LoRA and an explicit key-value cache: Qwen3, Qwen2.5 and Llama.

They share one block (grouped-query attention, then SwiGLU) and differ in three switches: norms of
queries and keys (Qwen3, arXiv 2505.09388), biases of query, key and value projections (Qwen2.5,
arXiv 2412.15115), neither (Llama 3, arXiv 2407.21783), and the kind of rotary embedding.

Shapes: b batch, t new tokens, n query heads, k key-value heads, h head dimension, d width,
v vocabulary.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fastslm_jax.models.attention import AttentionKernel, CausalSegments
from fastslm_jax.models.kv_cache import KVCache
from fastslm_jax.models.layers import split_heads, stack
from fastslm_jax.models.lora import LoRA, Projection


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding. The kinds and their parameters are those of `transformers`.

    Attributes:
        kind: default; yarn (arXiv 2309.00071); or llama3, which interpolates low frequencies.
        theta: the base of the wavelengths.
        factor: scaling factor of the context length; 1 disables scaling.
        original_max_positions: context length before scaling.
        beta_fast, beta_slow, attention_factor: of yarn.
        low_frequency_factor, high_frequency_factor: of llama3: wavelengths longer than
            original_max_positions / low_frequency_factor are scaled, those shorter than
            original_max_positions / high_frequency_factor are not, and those between are blended.
    """

    theta: float = 1_000_000.0
    factor: float = 1.0
    original_max_positions: int = 32_768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    kind: str = "default"

    def inverse_frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Frequencies [head_dim / 2], float32, and the scale of the cosines and sines."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = 1.0 / np.power(np.float32(self.theta), exponents, dtype=np.float32)
        frequencies = frequencies.astype(np.float32)
        if self.factor == 1.0 or self.kind == "default":
            return frequencies, 1.0
        if self.kind == "llama3":
            return self._llama3(frequencies), 1.0
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0
        return self._yarn(frequencies, head_dim), scale

    def _yarn(self, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
        def correction_dim(rotations: float) -> float:
            wavelength = self.original_max_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low = max(math.floor(correction_dim(self.beta_fast)), 0)
        high = min(math.ceil(correction_dim(self.beta_slow)), head_dim - 1)
        dimensions = np.arange(head_dim // 2, dtype=np.float32)
        extrapolated = 1 - np.clip((dimensions - low) / max(high - low, 0.001), 0, 1)
        frequencies = frequencies / self.factor * (1 - extrapolated) + frequencies * extrapolated
        return frequencies.astype(np.float32)

    def _llama3(self, frequencies: np.ndarray) -> np.ndarray:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        rotations = self.original_max_positions * frequencies / (2 * math.pi)
        kept = np.clip((rotations - low) / (high - low), 0, 1)
        return (frequencies / self.factor * (1 - kept) + frequencies * kept).astype(np.float32)

    def tables(self, position_ids: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of position_ids [b, t]: [b, t, head_dim / 2] float32."""
        frequencies, scale = self.inverse_frequencies(head_dim)
        angles = position_ids[:, :, None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale

    def __call__(self, x: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Rotates x [b, t, n, h] by position_ids [b, t] in float32; pairs are (i, i + h / 2)."""
        cos, sin = (table[:, :, None] for table in self.tables(position_ids, x.shape[-1]))
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last axis, in float32."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale, self.epsilon, self.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, dtype: jnp.dtype) -> jax.Array:
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return (x * scale.astype(jnp.float32)).astype(dtype)


class HeadRotation(nn.Module):
    """Norm of each head (if has_norm), then rotary embedding: [b, t, n · h] → [b, t, n, h]."""

    head_dim: int
    rope: RoPE
    epsilon: float
    has_norm: bool
    attention_kernel: AttentionKernel
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, position_ids: jax.Array, factor: float | None) -> jax.Array:
        """factor: multiply by it, in the attention kernel's own rotation; None: in plain XLA."""
        scale = None
        if self.has_norm:
            scale = self.param("scale", nn.initializers.ones, (self.head_dim,))
        if factor is not None:
            cos, sin = self.rope.tables(position_ids, self.head_dim)
            tables = (jnp.concatenate(pair, axis=-1) for pair in ((cos, cos), (-sin, sin)))
            return self.attention_kernel.tpu.rotate(x, scale, *tables, self.epsilon, factor)
        x = split_heads(x, x.shape[-1] // self.head_dim)
        if scale is not None:
            x = rms_norm(x, scale, self.epsilon, self.dtype)
        return self.rope(x, position_ids)


class DecoderBlock(nn.Module):
    """Pre-norm block: grouped-query attention, then SwiGLU.

    qk_norm: whether queries and keys are normalized per head.
    qkv_bias: whether the query, key and value projections have biases.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope: RoPE
    epsilon: float
    lora: LoRA
    deterministic: bool
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32
    qk_norm: bool = True
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, KVCache | None],
        position_ids: jax.Array,
        mask: CausalSegments | None,
        lora_gate: jax.Array | None,
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        """carry: x [b, t, d] and the cache, if any; with a cache, mask is None."""
        x, cache = carry

        def project(y: jax.Array, features: int, name: str, use_bias: bool = False) -> jax.Array:
            layer = Projection(features, use_bias, self.lora, self.dtype, name=name)
            return layer(y, lora_gate, self.deterministic)

        def rotated(y: jax.Array, name: str, factor: float | None) -> jax.Array:
            options = (self.rope, self.epsilon, self.qk_norm, self.attention_kernel, self.dtype)
            return HeadRotation(self.head_dim, *options, name=name)(y, position_ids, factor)

        hidden = RMSNorm(self.epsilon, self.dtype, name="attention_norm")(x)
        query, key, value = (
            project(hidden, count * self.head_dim, name, self.qkv_bias)
            for name, count in (
                ("query", self.num_heads),
                ("key", self.num_kv_heads),
                ("value", self.num_kv_heads),
            )
        )
        is_fused = cache is None and self.attention_kernel.rotates(query, key, self.head_dim)
        factors = (self.head_dim**-0.5, 1.0) if is_fused else (None, None)
        query = rotated(query, "query_norm", factors[0])
        key = rotated(key, "key_norm", factors[1])
        value = split_heads(value, self.num_kv_heads)
        if cache is None:
            out = self.attention_kernel(query, key, value, mask, is_scaled=is_fused)
        else:
            out, cache = cache.attend(query, key, value, position_ids)
        width = x.shape[-1]
        x = x + project(out.reshape(*out.shape[:-2], -1), width, "out")

        hidden = RMSNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        gate, up = (project(hidden, self.mlp_dim, name) for name in ("gate", "up"))
        return (x + project(jax.nn.silu(gate) * up, width, "down"), cache), None


class Decoder(nn.Module):
    """Dense decoder from embeddings to hidden states.

    Embedding and logits are separate methods, so that speech tokens can replace text embeddings.

    qk_norm, qkv_bias: see `DecoderBlock`.
    deterministic: False enables LoRA dropout; apply() then needs rngs={"dropout": ...}.
    remat, scan_layers: see `layers.stack`.
    """

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
    qk_norm: bool = True
    qkv_bias: bool = False
    lora: LoRA = LoRA()
    deterministic: bool = True
    remat: str = "none"
    scan_layers: bool = True
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        normal, shape = nn.initializers.normal(0.02), (self.vocab_size, self.width)
        self.embed_tokens = self.param("embed_tokens", normal, shape)
        if not self.tied_embeddings:
            self.lm_head = self.param("lm_head", normal, shape)
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.mlp_dim)
        options = (self.rope, self.epsilon, self.lora, self.deterministic)
        blocks = stack(DecoderBlock, self.num_layers, self.remat, scan_layers=self.scan_layers)
        switches = (self.qk_norm, self.qkv_bias)
        self.layers = blocks(*sizes, *options, self.attention_kernel, self.dtype, *switches)
        self.final_norm = RMSNorm(self.epsilon, self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [b, t] → embeddings [b, t, d]."""
        return jnp.take(self.embed_tokens, tokens, axis=0).astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] → float32 logits [..., v]."""
        table = self.embed_tokens if self.tied_embeddings else self.lm_head
        return _unembed(hidden, table.astype(self.dtype))

    def __call__(
        self,
        embeddings: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        lora_gate: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Embeddings [b, t, d] → hidden states [b, t, d] after the final norm, and the cache.

        Args:
            position_ids: [b, t]. With a cache, token i of a row is written to cache position
                position_ids[row, 0] + i.
            segment_ids: [b, t]; tokens attend within their segment only. Segments are
                contiguous. Ignored with a cache.
            lora_gate: [b, t] or [b, 1]; 0 disables LoRA for a token. None: enabled everywhere.
            cache: see `init_cache`. Positions after a token are masked.
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

    def init_cache(self, batch: int, cache_length: int, dtype: DTypeLike | None = None) -> KVCache:
        """Empty cache of `batch` rows; int8 needs half the memory of bfloat16."""
        heads, dtype = self.num_kv_heads, dtype or self.dtype
        return KVCache.empty(self.num_layers, batch, heads, cache_length, self.head_dim, dtype)


@jax.custom_vjp
def _unembed(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """hidden [..., d], table [v, d] → float32 logits [..., v].

    The backward pass rounds the gradient of the logits to the dtype of the table. Otherwise the
    table would be converted to float32 for a product in float32.
    """
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _unembed_forward(
    hidden: jax.Array, table: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _unembed(hidden, table), (hidden, table)


def _unembed_backward(
    inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    hidden, table = inputs
    gradient = gradient.astype(table.dtype)
    d_hidden = jnp.einsum("...v,vd->...d", gradient, table, preferred_element_type=jnp.float32)
    d_table = jnp.einsum("...v,...d->vd", gradient, hidden, preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype)


_unembed.defvjp(_unembed_forward, _unembed_backward)
