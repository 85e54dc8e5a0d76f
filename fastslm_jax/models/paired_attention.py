"""Bidirectional attention with heads of 64 on [b, t, n · h], as a Pallas TPU kernel.

Splash attention takes [b, n, t, h]. With heads of 64, half of every tile of such an array is
padding, and the arrays must be transposed. This kernel reads two heads at a time as they are. One
block has all keys, so there is no running maximum. The backward pass is that of splash attention.

Shapes: b batch, t queries, s keys, n heads, h head dimension.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Ref = jax.Ref
HEAD_DIM, LANES = 64, 128  # LANES: of a vector register, two heads
BLOCK = 512  # queries at a time, at most
MAX_KEYS = 2048  # of which all scores of a block of queries fit in on-chip memory


def supports(query: jax.Array, key: jax.Array, shards: int) -> bool:
    """Whether the kernel takes query [b, t, n, h] and key [b, s, n, h], split by heads."""
    lengths = (query.shape[1], key.shape[1])
    return (
        query.shape[2:] == key.shape[2:]
        and query.shape[3] == HEAD_DIM
        and query.shape[2] % (2 * shards) == 0
        and all(length % LANES == 0 for length in lengths)
        and lengths[1] <= MAX_KEYS
    )


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, keys: int, *, interpret: bool = False
) -> jax.Array:
    """query [b, t, n · h], key and value [b, s, n · h] → [b, t, n · h].

    keys: number of keys; the rest of the s are padding.
    """
    (batch, length, width), context = query.shape, key.shape[1]
    block = next(size for size in (BLOCK, 384, 256, LANES) if length % size == 0)
    pair = pl.BlockSpec((None, block, LANES), lambda b, n, t: (b, t, n))
    all_keys = pl.BlockSpec((None, context, LANES), lambda b, n, t: (b, 0, n))
    return pl.pallas_call(
        functools.partial(_kernel, keys=keys),
        grid=(batch, width // LANES, length // block),
        in_specs=[pair, all_keys, all_keys],
        out_specs=pair,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        interpret=interpret,
        name="paired_attention",
    )(query, key, value)


def _kernel(query_ref: Ref, key_ref: Ref, value_ref: Ref, out_ref: Ref, *, keys: int) -> None:
    for first in range(0, LANES, HEAD_DIM):
        head = slice(first, first + HEAD_DIM)
        query = query_ref[:, head] * jnp.asarray(HEAD_DIM**-0.5, query_ref.dtype)
        scores = jax.lax.dot_general(
            query, key_ref[:, head], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(position < keys, scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1, keepdims=True)
        out = jax.lax.dot_general(
            weights.astype(value_ref.dtype),
            value_ref[:, head],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        out_ref[:, head] = (out / total).astype(out_ref.dtype)
