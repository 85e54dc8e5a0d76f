"""Checksums of arrays, computed on their devices and independent of the mesh."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# Unsigned type by element size; an element of eight bytes becomes two words.
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


def _sum(leaf: jax.Array) -> jax.Array:
    """Σ bits[i] · (2 i + 1) modulo 2³², where i is the index in row-major order.

    Integer sums do not depend on the order of summation. Odd factors are invertible modulo 2³², so
    a change of any single element changes the sum.
    """
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index = index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def leaf_paths(tree: Mapping) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """{path: leaf}, for example {"opt_state/0/count": …}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def checksums(tree: Mapping) -> dict[str, str]:
    """{path of a leaf: "dtype:sum"}."""
    leaves = leaf_paths(tree)
    sums = jax.device_get(_sums([jnp.asarray(leaf) for leaf in leaves.values()]))
    return {
        path: f"{leaf.dtype}:{int(total)}"
        for (path, leaf), total in zip(leaves.items(), sums, strict=True)
    }


def changed(tree: Mapping, expected: Mapping[str, str]) -> list[str]:
    """Paths of leaves whose checksum is not the expected one.

    Leaves restored in another dtype than they were saved in are not compared.
    """
    paths = []
    for path, now in checksums(tree).items():
        before = expected[path]
        if before.split(":")[0] == now.split(":")[0] and before != now:
            paths.append(path)
    return sorted(paths)
