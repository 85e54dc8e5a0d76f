"""Blockwise attention in plain XLA: the fallback where no fused kernel is available.

Follows arXiv 2205.14135. Causal queries are processed in blocks, each over the keys up to its last
query. The backward pass recomputes the scores instead of saving them. On a CPU this is two to three
times as fast as `jax.nn.dot_product_attention`, which computes and saves all scores.

Shapes: b batch, t queries, s keys, n query heads, k key-value heads, g = n / k, h head dimension;
q = g · t in a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Causal attention: at least MIN_BLOCK queries per block, and at most MAX_BLOCKS blocks.
MIN_BLOCK, MAX_BLOCKS = 512, 16
MASKED = -1e30  # score of a masked key


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool = False,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """query [b, t, n, h], key and value [b, s, k, h] → [b, t, n, h]. Sums are in float32.

    Args:
        is_causal: mask later keys; requires t = s.
        segment_ids: [b, t]; mask keys of other segments. Ignored unless is_causal.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, keys = key.shape[2], key.shape[1]
    query = (query * head_dim**-0.5).reshape(batch, length, kv_heads, -1, head_dim)
    query = jnp.transpose(query, (0, 2, 3, 1, 4))  # [b, k, g, t, h]
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS)) if is_causal else length
    parts = []
    for first in range(0, length, size):
        last = min(first + size, length)
        visible = slice(0, last if is_causal else keys)
        block = query[:, :, :, first:last].reshape(batch, kv_heads, -1, head_dim)
        out = _block(
            block,
            key[:, :, visible],
            value[:, :, visible],
            segment_ids,
            first if is_causal else None,
        )
        parts.append(out.reshape(batch, kv_heads, -1, last - first, head_dim))
    out = jnp.concatenate(parts, axis=3)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, length, heads, head_dim)


def causal_mask(segment_ids: jax.Array | None, first: int, last: int) -> jax.Array:
    """Mask of queries first to last - 1 over keys 0 to last - 1: [b or 1, last - first, last]."""
    mask = (jnp.arange(first, last)[:, None] >= jnp.arange(last))[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, first:last, None] == segment_ids[:, None, :last])
    return mask


def _matmul(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Contracts one axis of left and right, batched over [b, k]: [b, k, left, right] float32."""
    dimensions = (((left_axis,), (right_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _scores(
    query: jax.Array, key: jax.Array, segment_ids: jax.Array | None, first: int | None
) -> jax.Array:
    scores = _matmul(query, key, 3, 3)
    if first is None:
        return scores
    mask = causal_mask(segment_ids, first, key.shape[2])
    groups = query.shape[2] // mask.shape[1]
    return jnp.where(jnp.tile(mask, (1, groups, 1))[:, None], scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _block(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    first: int | None,
) -> jax.Array:
    """query [b, k, q, h] (scaled), key and value [b, k, s, h] → [b, k, q, h].

    first: position of the block's first query if causal, else None.
    """
    return _forward(query, key, value, segment_ids, first)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    first: int | None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    scores = _scores(query, key, segment_ids, first)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_matmul(weights.astype(value.dtype), value, 3, 2) / total).astype(query.dtype)
    out, log_total = checkpoint_name((out, highest + jnp.log(total)), "attention")
    return out, (query, key, value, segment_ids, out, log_total)


def _backward(
    first: int | None, residuals: tuple[jax.Array | None, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, segment_ids, out, log_total = residuals
    dtype = query.dtype
    weights = jnp.exp(_scores(query, key, segment_ids, first) - log_total)
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (weights * (_matmul(gradient, value, 3, 3) - delta)).astype(dtype)
    d_query = _matmul(d_scores, key, 3, 2).astype(dtype)
    # The scores are the second operand, so that XLA does not have to transpose them.
    d_key = jnp.swapaxes(_matmul(query, d_scores, 2, 2), 2, 3).astype(dtype)
    d_value = jnp.swapaxes(_matmul(gradient, weights.astype(dtype), 2, 2), 2, 3).astype(dtype)
    return d_query, d_key, d_value, None


_block.defvjp(_forward, _backward)
