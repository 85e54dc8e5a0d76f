"""Key-value cache of the decoder, updated in place and read in blocks.

Attention reads only the blocks that contain tokens, so its time grows with the filled length.

Shapes: l layers, b rows, k key-value heads, s cache positions, h head dimension; r active rows,
t new tokens, n query heads.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

BLOCK = 512  # largest number of cache positions that attention reads at a time
MASKED = -1e30  # score of a masked position


def block_size(cache_length: int) -> int:
    """Cache positions per attention block: an eighth of the cache, or all of a small one."""
    return cache_length if cache_length < 256 else min(BLOCK, cache_length // 8)


class KVCache(struct.PyTreeNode):
    """Keys and values of all layers.

    keys, values: [l, b, k, s, h], floating point, or int8 with one scale per head and position.
    key_scales, value_scales: [l, b, k, s] float32 for an int8 cache, else None.
    layer: index of the current layer.
    rows: [r], indices of the active rows; None if all rows are active.
    is_sharded: whether the arrays are sharded over several devices.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    layer: jax.Array
    rows: jax.Array | None = None
    is_sharded: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        heads: int,
        cache_length: int,
        head_dim: int,
        dtype: DTypeLike,
    ) -> "KVCache":
        """Zero-filled cache.

        Raises:
            ValueError: the length is not a multiple of the attention block.
        """
        if cache_length % block_size(cache_length):
            raise ValueError(
                f"cache length {cache_length} must be a multiple of its attention block of "
                f"{block_size(cache_length)} positions"
            )
        shape, is_int8 = (layers, rows, heads, cache_length, head_dim), jnp.dtype(dtype) == jnp.int8
        scales = [jnp.zeros(shape[:-1], jnp.float32) if is_int8 else None for _ in range(2)]
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales, jnp.int32(0))

    @property
    def cache_length(self) -> int:
        return self.keys.shape[3]

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, position_ids: jax.Array
    ) -> tuple[jax.Array, "KVCache"]:
        """Writes new keys and values, then computes causal attention over the cache.

        Args:
            query: [r, t, n, h].
            key, value: [r, t, k, h].
            position_ids: [r, t], consecutive; token i of a row is written to
                position_ids[row, 0] + i.

        Returns:
            Output [r, t, n, h], and the cache advanced to the next layer.
        """
        start = position_ids[:, 0]
        keys, key_scales = self._write(self.keys, self.key_scales, key, start)
        values, value_scales = self._write(self.values, self.value_scales, value, start)
        cache = self.replace(
            keys=keys, values=values, key_scales=key_scales, value_scales=value_scales
        )
        return cache._read(query, position_ids), cache.replace(layer=self.layer + 1)

    def _write(
        self, store: jax.Array, scales: jax.Array | None, new: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Writes new [r, t, k, h] into the current layer from positions start [r]."""
        new = jnp.moveaxis(new, 1, 2)  # [r, k, t, h]
        if scales is None:
            return self._update(store, new.astype(store.dtype), start), None
        scale = jnp.max(jnp.abs(new.astype(jnp.float32)), axis=-1) / 127
        quantized = jnp.round(new.astype(jnp.float32) / jnp.maximum(scale, 1e-30)[..., None])
        return (
            self._update(store, quantized.astype(jnp.int8), start),
            self._update(scales, scale, start),
        )

    def _update(self, store: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        """Writes new [r, k, t(, h)] into store [l, b, k, s(, h)] from positions start [r].

        A GPU writes all rows in one scatter. The TPU and CPU compilers turn a scatter into a serial
        loop and copy the whole cache around it, so there each row is an in-place update. Demo
        decoder on two CPU cores, 16 rows of 1024 positions: 17 ms per step, 249 ms with a scatter.
        Rows that are sharded over devices are scattered everywhere: each device writes its rows,
        while an update of one row needs communication.
        """
        scatter = functools.partial(scatter_rows, layer=self.layer, rows=self.rows)
        if self.is_sharded and self.rows is None:
            return scatter(store, new, start)
        slices = functools.partial(update_rows, layer=self.layer, rows=self.rows)
        return jax.lax.platform_dependent(
            store, new, start, cuda=scatter, rocm=scatter, default=slices
        )

    def _block(
        self,
        store: jax.Array,
        scales: jax.Array | None,
        first: jax.Array | int,
        size: int,
        dtype: jnp.dtype,
    ) -> jax.Array:
        """Positions first to first + size of the active rows: [r, k, size, h]."""

        def read(array: jax.Array) -> jax.Array:
            tail = array.shape[4:]

            def part(row: jax.Array | int, rows: int) -> jax.Array:
                start = (self.layer, row, 0, first, *(0 for _ in tail))
                shape = (1, rows, array.shape[2], size, *tail)
                return jax.lax.dynamic_slice(array, start, shape)[0]

            if self.rows is None:
                return part(0, array.shape[1])
            return jnp.concatenate([part(self.rows[i], 1) for i in range(self.rows.shape[0])])

        block = read(store)
        if scales is not None:
            block = block.astype(jnp.float32) * read(scales)[..., None]
        return block.astype(dtype)

    def _read(self, query: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Attention over the filled blocks, with an online softmax in float32."""
        rows, length, heads, head_dim = query.shape
        groups = heads // self.keys.shape[2]
        query = jnp.transpose(query.reshape(rows, length, -1, groups, head_dim), (0, 2, 3, 1, 4))
        query = query.reshape(rows, -1, groups * length, head_dim)  # [r, k, q, h], q = group · t
        last = jnp.tile(position_ids, (1, groups))[:, None, :, None]  # [r, 1, q, 1]
        size = block_size(self.cache_length)
        scores_product = _multiply("rkqh,rksh->rkqs", summed_scores, length == 1)
        values_product = _multiply("rkqs,rksh->rkqh", summed_values, length == 1)

        def scores_of(first: jax.Array | int) -> jax.Array:
            keys = self._block(self.keys, self.key_scales, first, size, query.dtype)
            scores = scores_product(query, keys) * head_dim**-0.5
            return jnp.where(first + jnp.arange(size) <= last, scores, MASKED)

        def weighted_values(weights: jax.Array, first: jax.Array | int) -> jax.Array:
            values = self._block(self.values, self.value_scales, first, size, query.dtype)
            return values_product(weights.astype(query.dtype), values)

        if self.cache_length == size:
            out = weighted_values(jax.nn.softmax(scores_of(0), axis=-1), 0)
        else:

            def body(
                block: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
            ) -> tuple[jax.Array, jax.Array, jax.Array]:
                highest, total, out = carry
                scores = scores_of(block * size)
                new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
                weights, rescale = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
                total = total * rescale + jnp.sum(weights, axis=-1, keepdims=True)
                return new_highest, total, out * rescale + weighted_values(weights, block * size)

            num_blocks = jnp.max(position_ids) // size + 1
            shape = (*query.shape[:3], 1)
            init = (
                jnp.full(shape, MASKED),
                jnp.zeros(shape),
                jnp.zeros(query.shape, jnp.float32),
            )
            _, total, out = jax.lax.fori_loop(0, num_blocks, body, init)
            out = out / total
        out = jnp.transpose(out.reshape(rows, -1, groups, length, head_dim), (0, 3, 1, 2, 4))
        return out.reshape(rows, length, heads, head_dim).astype(query.dtype)


def _multiply(
    equation: str, summed: Callable[..., jax.Array], is_decoding: bool
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A matrix product in float32, or for decoding on a GPU, the same as a sum.

    There, XLA copies a block of the cache before a matrix product reads it, and converts an int8
    block before that. An elementwise product and its sum are one kernel, which reads the cache
    where it is. With one query per row, reading takes all the time.
    """
    product = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    if not is_decoding:
        return product
    return functools.partial(jax.lax.platform_dependent, cuda=summed, rocm=summed, default=product)


def summed_scores(query: jax.Array, keys: jax.Array) -> jax.Array:
    """query [r, k, q, h], keys [r, k, s, h] → float32 scores [r, k, q, s], without dots."""
    query, keys = (x.astype(jnp.float32) for x in (query, keys))
    return jnp.sum(query[:, :, :, None] * keys[:, :, None], axis=-1)


def summed_values(weights: jax.Array, values: jax.Array) -> jax.Array:
    """weights [r, k, q, s], values [r, k, s, h] → float32 [r, k, q, h], without dots."""
    weights, values = (x.astype(jnp.float32) for x in (weights, values))
    products = weights[..., None] * values[:, :, None]
    # XLA would rather sum over the last axis, and transpose the whole cache for that.
    products = with_layout_constraint(products, Layout(major_to_minor=(0, 1, 2, 3, 4)))
    return jnp.sum(products, axis=-2)


def scatter_rows(
    store: jax.Array,
    new: jax.Array,
    start: jax.Array,
    *,
    layer: jax.Array,
    rows: jax.Array | None,
) -> jax.Array:
    """Writes all rows in one scatter; see `KVCache._update` for the shapes."""
    if rows is None:
        tail = (0,) * (store.ndim - 4)

        def write(row: jax.Array, value: jax.Array, first: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(row, value[None], (layer, 0, first, *tail))

        # Batched with vmap, so that sharded rows stay on their devices.
        return jax.vmap(write, in_axes=(1, 0, 0), out_axes=1)(store, new, start)
    heads = jnp.arange(new.shape[1])[:, None]
    positions = start[:, None, None] + jnp.arange(new.shape[2])
    return store.at[layer, rows[:, None, None], heads, positions].set(new)


def update_rows(
    store: jax.Array,
    new: jax.Array,
    start: jax.Array,
    *,
    layer: jax.Array,
    rows: jax.Array | None,
) -> jax.Array:
    """Writes one row after the other, in place; see `KVCache._update` for the shapes."""
    tail = (0,) * (store.ndim - 4)
    for i in range(len(new)):
        row = i if rows is None else rows[i]
        index = (layer, row, 0, start[i], *tail)
        store = jax.lax.dynamic_update_slice(store, new[None, i : i + 1], index)
    return store
