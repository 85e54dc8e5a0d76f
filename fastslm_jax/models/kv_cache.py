"""The decoder's key-value cache: written in place, read in blocks, so that memory and time follow what is filled.

Shapes: l layers, b rows, k key-value heads, s slots, h head dimension; r rows at work, t new tokens, n query heads.
"""

import jax
import jax.numpy as jnp
from flax import struct

BLOCK = 512  # slots that attention reads at a time of a cache, at most
LOWEST = -1e30


def block_size(slots: int) -> int:
    """Slots that attention reads at a time of a cache of so many: an eighth, or all of a very small one."""
    return slots if slots < 256 else min(BLOCK, slots // 8)


class KVCache(struct.PyTreeNode):
    """Keys and values of all layers. One layer's `attend` writes its new slots and reads all before them.

    keys, values: [l, b, k, s, h], of a floating type, or int8 with one scale for each head and slot.
    key_scales, value_scales: [l, b, k, s] float32, None unless the cache is int8.
    layer: the layer whose turn it is.
    rows: [r], the rows at work; None: all of them, in order.
    is_spread: rows lie on several devices. Then they are written at once, each device its own; else one after the other: a
        scatter copies the whole cache on a CPU.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    layer: jax.Array
    rows: jax.Array | None = None
    is_spread: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, slots: int, head_dim: int, dtype
    ) -> "KVCache":
        if slots % block_size(slots):
            raise ValueError(
                f"a cache of {slots} slots: must be a multiple of the {block_size(slots)} that are read at a time"
            )
        shape, is_int8 = (layers, rows, heads, slots, head_dim), jnp.dtype(dtype) == jnp.int8
        scales = [jnp.zeros(shape[:-1], jnp.float32) if is_int8 else None for _ in range(2)]
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales, jnp.int32(0))

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, position_ids: jax.Array):
        """Causal attention of new tokens over the cache, their own slots included; the layer moves on by one.

        Args:
            query: [r, t, n, h]; key, value: [r, t, k, h].
            position_ids: [r, t], ascending by one; token i of a row goes to slot position_ids[row, 0] + i.

        Returns:
            [r, t, n, h], and the cache.
        """
        start = position_ids[:, 0]
        keys, key_scales = self._write(self.keys, self.key_scales, key, start)
        values, value_scales = self._write(self.values, self.value_scales, value, start)
        cache = self.replace(
            keys=keys, values=values, key_scales=key_scales, value_scales=value_scales
        )
        return cache._read(query, position_ids), cache.replace(layer=self.layer + 1)

    def _write(self, store, scales, new, start):
        new = jnp.moveaxis(new, 1, 2)  # [r, k, t, h]
        if scales is None:
            return self._place(store, new.astype(store.dtype), start), None
        scale = jnp.max(jnp.abs(new.astype(jnp.float32)), axis=-1) / 127
        rounded = jnp.round(new.astype(jnp.float32) / jnp.maximum(scale, 1e-30)[..., None])
        return self._place(store, rounded.astype(jnp.int8), start), self._place(
            scales, scale, start
        )

    def _place(self, store, new, start):
        """new [r, k, t(, h)] into store [l, b, k, s(, h)], slot start [r] on."""
        tail = (0,) * (store.ndim - 4)
        if self.is_spread and self.rows is None:

            def place(row, value, at):  # [l, k, s(, h)]
                return jax.lax.dynamic_update_slice(row, value[None], (self.layer, 0, at, *tail))

            return jax.vmap(place, in_axes=(1, 0, 0), out_axes=1)(store, new, start)

        def place_row(i, store):
            row = i if self.rows is None else self.rows[i]
            value = jax.lax.dynamic_index_in_dim(new, i, keepdims=True)[None]
            return jax.lax.dynamic_update_slice(store, value, (self.layer, row, 0, start[i], *tail))

        return jax.lax.fori_loop(0, len(new), place_row, store)

    def _block(self, store, scales, first, size, dtype):
        """Slots first … first + size of the rows at work: [r, k, size, h]."""

        def read(array):
            tail = array.shape[4:]

            def part(row, rows):
                shape = (1, rows, array.shape[2], size, *tail)
                return jax.lax.dynamic_slice(
                    array, (self.layer, row, 0, first, *(0 for _ in tail)), shape
                )[0]

            if self.rows is None:
                return part(0, array.shape[1])
            return jnp.concatenate([part(self.rows[i], 1) for i in range(self.rows.shape[0])])

        block = read(store)
        if scales is not None:
            block = block.astype(jnp.float32) * read(scales)[..., None]
        return block.astype(dtype)

    def _read(self, query, position_ids):
        """Softmax over the blocks that hold anything, one after the other, in float32."""
        rows, length, heads, head_dim = query.shape
        groups = heads // self.keys.shape[2]
        query = jnp.transpose(query.reshape(rows, length, -1, groups, head_dim), (0, 2, 3, 1, 4))
        query = query.reshape(rows, -1, groups * length, head_dim)  # [r, k, q, h], q = group · t
        last = jnp.tile(position_ids, (1, groups))[:, None, :, None]  # [r, 1, q, 1]
        size = block_size(self.slots)

        def scores_of(first):
            keys = self._block(self.keys, self.key_scales, first, size, query.dtype)
            scores = (
                jnp.einsum("rkqh,rksh->rkqs", query, keys, preferred_element_type=jnp.float32)
                * head_dim**-0.5
            )
            return jnp.where(first + jnp.arange(size) <= last, scores, LOWEST)

        def weighted(weights, first):
            values = self._block(self.values, self.value_scales, first, size, query.dtype)
            return jnp.einsum(
                "rkqs,rksh->rkqh",
                weights.astype(query.dtype),
                values,
                preferred_element_type=jnp.float32,
            )

        if self.slots == size:
            out = weighted(jax.nn.softmax(scores_of(0), axis=-1), 0)
        else:

            def body(number, carry):
                highest, total, out = carry
                scores = scores_of(number * size)
                new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
                weights, shrink = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
                total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
                return new_highest, total, out * shrink + weighted(weights, number * size)

            blocks = jnp.max(position_ids) // size + 1
            shape = query.shape[:3]
            start = (
                jnp.full((*shape, 1), LOWEST),
                jnp.zeros((*shape, 1)),
                jnp.zeros(query.shape, jnp.float32),
            )
            _, total, out = jax.lax.fori_loop(0, blocks, body, start)
            out = out / total
        out = out.reshape(rows, -1, groups, length, head_dim)
        return (
            jnp.transpose(out, (0, 3, 1, 2, 4))
            .reshape(rows, length, heads, head_dim)
            .astype(query.dtype)
        )
