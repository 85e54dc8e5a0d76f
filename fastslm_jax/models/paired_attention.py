"""Bidirectional attention with heads of 64 on [b, t, n · h], as a Pallas TPU kernel.

Splash attention takes [b, n, t, h]. With heads of 64, half of every tile of such an array is
padding, the arrays must be transposed, and their lengths must be multiples of 128. This kernel
reads two heads at a time as they are. A block has all keys, so there is no running maximum.

Shapes: b batch, t queries, s keys, n heads, h head dimension.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Ref = jax.Ref
HEAD_DIM, LANES = 64, 128  # LANES: of a vector register, two heads
BLOCK = 512  # queries at a time, at most
MAX_KEYS = 3072  # of which all scores of a block of queries fit in on-chip memory


def supports(query: jax.Array, key: jax.Array, shards: int) -> bool:
    """Whether the kernel takes query [b, t, n, h] and key [b, s, n, h], split by heads."""
    return (
        query.shape[2:] == key.shape[2:]
        and query.shape[3] == HEAD_DIM
        and query.shape[2] % (2 * shards) == 0
        and key.shape[1] <= MAX_KEYS
        and _block(query.shape[1]) > 0
    )


def has_backward(query: jax.Array) -> bool:
    """Whether a block of the kernel has all queries, which its backward pass needs."""
    return query.shape[1] <= BLOCK


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, keys: int, *, interpret: bool = False
) -> jax.Array:
    """query [b, t, n · h], key and value [b, s, n · h] → [b, t, n · h].

    keys: number of keys; the rest of the s are padding.
    """
    return _call(_forward_kernel, (query, key, value), (query,), keys, interpret)[0]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gradient: jax.Array,
    keys: int,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Gradients of query, key and value from that of the output."""
    arrays = (query, gradient, key, value)
    return tuple(_call(_backward_kernel, arrays, (query, key, value), keys, interpret))


def _block(length: int) -> int:
    """Queries at a time: all, or the largest multiple of LANES that divides them; 0: neither."""
    sizes = (length, *range(BLOCK, 0, -LANES))
    return next((size for size in sizes if size <= BLOCK and length % size == 0), 0)


def _call(
    kernel: Callable[..., None],
    arrays: tuple[jax.Array, ...],
    results: tuple[jax.Array, ...],
    keys: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel on two heads at a time. The last two arrays are those of the keys."""
    batch, length, width = arrays[0].shape
    block = _block(length)
    queries = pl.BlockSpec((None, block, LANES), lambda b, n, t: (b, t, n))
    all_keys = pl.BlockSpec((None, arrays[-1].shape[1], LANES), lambda b, n, t: (b, 0, n))
    return pl.pallas_call(
        functools.partial(kernel, keys=keys),
        grid=(batch, width // LANES, length // block),
        in_specs=[*[queries] * (len(arrays) - 2), all_keys, all_keys],
        out_specs=[queries, all_keys, all_keys][: len(results)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        interpret=interpret,
        name=f"paired_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*arrays)


def _forward_kernel(
    query_ref: Ref, key_ref: Ref, value_ref: Ref, out_ref: Ref, *, keys: int
) -> None:
    for head in _heads():
        weights, total = _weights(query_ref[:, head], key_ref[:, head], keys)
        out = _product(weights.astype(value_ref.dtype), value_ref[:, head], 1, 0)
        out_ref[:, head] = (out / total).astype(out_ref.dtype)


def _backward_kernel(
    query_ref: Ref,
    gradient_ref: Ref,
    key_ref: Ref,
    value_ref: Ref,
    d_query_ref: Ref,
    d_key_ref: Ref,
    d_value_ref: Ref,
    *,
    keys: int,
) -> None:
    for head in _heads():
        query, key, gradient = query_ref[:, head], key_ref[:, head], gradient_ref[:, head]
        weights, total = _weights(query, key, keys)
        weights = weights / total
        d_value_ref[:, head] = _product(weights.astype(query.dtype), gradient, 0, 0).astype(
            d_value_ref.dtype
        )
        d_weights = _product(gradient, value_ref[:, head], 1, 1)
        delta = jnp.sum(weights * d_weights, axis=1, keepdims=True)
        d_scores = (weights * (d_weights - delta) * HEAD_DIM**-0.5).astype(query.dtype)
        d_query_ref[:, head] = _product(d_scores, key, 1, 0).astype(d_query_ref.dtype)
        d_key_ref[:, head] = _product(d_scores, query, 0, 0).astype(d_key_ref.dtype)


def _heads() -> tuple[slice, ...]:
    return tuple(slice(first, first + HEAD_DIM) for first in range(0, LANES, HEAD_DIM))


def _weights(query: jax.Array, key: jax.Array, keys: int) -> tuple[jax.Array, jax.Array]:
    """Exponentials of the scores [t, s], and their sums [t, 1]."""
    scores = _product(query * jnp.asarray(HEAD_DIM**-0.5, query.dtype), key, 1, 1)
    if keys < len(key):
        position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(position < keys, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Contracts an axis of each, in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
