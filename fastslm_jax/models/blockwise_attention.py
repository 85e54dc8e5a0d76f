"""Attention in plain XLA operations that keeps no scores (arXiv 2205.14135): what runs where no kernel does.

Causal queries go in blocks, each over the keys up to its last one; the backward pass computes scores again instead of being
given them. On a CPU that is two to three times as fast as `jax.nn.dot_product_attention`, which computes and keeps all scores.

Shapes: b batch, t queries, s keys, n query heads, k key-value heads, g = n / k, h head dimension; q = g · t in a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK, BLOCKS = (
    512,
    16,
)  # queries of a block of causal attention: at least so many, and at most so many blocks
LOWEST = -1e30


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """query [b, t, n, h], key and value [b, s, k, h] → [b, t, n, h]. Sums within a block are in float32.

    is_causal: t = s, and a token sees itself and earlier ones; segment_ids [b, t]: of its own segment only.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, keys = key.shape[2], key.shape[1]
    query = (query * head_dim**-0.5).reshape(batch, length, kv_heads, -1, head_dim)
    query = jnp.transpose(query, (0, 2, 3, 1, 4))  # [b, k, g, t, h]
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    size = max(BLOCK, -(-length // BLOCKS)) if is_causal else length
    parts = []
    for first in range(0, length, size):
        last = min(first + size, length)
        seen = slice(0, last if is_causal else keys)
        rows = query[:, :, :, first:last].reshape(batch, kv_heads, -1, head_dim)
        out = _block(
            rows, key[:, :, seen], value[:, :, seen], segment_ids, first if is_causal else None
        )
        parts.append(out.reshape(batch, kv_heads, -1, last - first, head_dim))
    out = jnp.concatenate(parts, axis=3)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, length, heads, head_dim)


def causal_mask(segment_ids: jax.Array | None, first: int, last: int) -> jax.Array:
    """Queries first … last - 1 against the keys before last: [b or 1, last - first, last] bool."""
    mask = (jnp.arange(first, last)[:, None] >= jnp.arange(last))[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, first:last, None] == segment_ids[:, None, :last])
    return mask


def _product(left, right, left_axis, right_axis):
    """Matrix product over one axis of each, for every row and head: [b, k, left's other axis, right's other axis] float32."""
    dimensions = (((left_axis,), (right_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _scores(query, key, segment_ids, first):
    scores = _product(query, key, 3, 3)
    if first is None:
        return scores
    mask = causal_mask(segment_ids, first, key.shape[2])
    return jnp.where(
        jnp.tile(mask, (1, query.shape[2] // mask.shape[1], 1))[:, None], scores, LOWEST
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _block(query, key, value, segment_ids, first):
    """query [b, k, q, h] (scaled), key and value [b, k, s, h] → [b, k, q, h]; first: its first token if causal, else None."""
    return _forward(query, key, value, segment_ids, first)[0]


def _forward(query, key, value, segment_ids, first):
    scores = _scores(query, key, segment_ids, first)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_product(weights.astype(value.dtype), value, 3, 2) / total).astype(query.dtype)
    out, log_total = checkpoint_name((out, highest + jnp.log(total)), "attention")
    return out, (query, key, value, segment_ids, out, log_total)


def _backward(first, kept, gradient):
    query, key, value, segment_ids, out, log_total = kept
    dtype = query.dtype
    weights = jnp.exp(_scores(query, key, segment_ids, first) - log_total)
    along = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    of_scores = (weights * (_product(gradient, value, 3, 3) - along)).astype(dtype)
    # The scores are the second factor, so that XLA need not transpose them.
    of_key, of_value = (
        _product(query, of_scores, 2, 2),
        _product(gradient, weights.astype(dtype), 2, 2),
    )
    of_query = _product(of_scores, key, 3, 2).astype(dtype)
    return (
        of_query,
        jnp.swapaxes(of_key, 2, 3).astype(dtype),
        jnp.swapaxes(of_value, 2, 3).astype(dtype),
        None,
    )


_block.defvjp(_forward, _backward)
