"""Checksums of arrays, computed where the arrays lie: the same on any mesh, so that a checkpoint is known again on another."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_WORDS = {
    1: jnp.uint8,
    2: jnp.uint16,
    4: jnp.uint32,
    8: jnp.uint32,
}  # an element of eight bytes is two words


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(leaf: jax.Array) -> jax.Array:
    """Σ bits[i] · (2 i + 1) modulo 2³², i the place in row-major order.

    Whole numbers add up to the same in any order, and the odd factors let no change of one element pass.
    """
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def checksums(tree: Mapping) -> dict[str, str]:
    """{path of a leaf: "type:sum"}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get(_sums([jnp.asarray(leaf) for _, leaf in leaves]))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {
        path: f"{leaf.dtype}:{int(total)}"
        for path, (_, leaf), total in zip(paths, leaves, sums, strict=True)
    }


def changed(tree: Mapping, expected: Mapping[str, str]) -> list[str]:
    """Paths of leaves that are not what they were. Leaves that are read in another type, or were never summed, do not count."""
    names = {}
    for path, now in checksums(tree).items():
        before = expected.get(path, now)
        if before.split(":")[0] == now.split(":")[0] and before != now:
            names[path] = now
    return sorted(names)
