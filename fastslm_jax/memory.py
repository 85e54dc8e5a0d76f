"""Device memory: bytes by kind, and the check that something fits."""

import math
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastslm_jax.errors import UserError

GIB = 2**30


class CapacityError(UserError):
    """Something does not fit in memory. The message gives the sizes and what to change."""


def bytes_per_device(tree: object) -> int:
    """Bytes per device of sharded arrays, or of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def capacity_of(mesh: Mesh) -> int | None:
    """Memory of one device of the mesh in bytes, or None if unknown.

    Virtual CPU devices share the memory of the machine equally.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def free_bytes() -> int | None:
    """Free bytes on the first local device (on CPU, of the machine), or None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = pathlib.Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not meminfo.is_file():
        return None
    lines = dict(
        line.split(":", 1)
        for line in meminfo.read_text(encoding="utf-8").splitlines()
        if ":" in line
    )
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def step_bytes(frozen: object, trained: object, opt_state: object, batch: object) -> dict[str, int]:
    """Bytes per device of the inputs of a train step, by kind."""
    kinds = {"frozen": frozen, "trained": trained, "optimizer": opt_state, "batch": batch}
    return {name: bytes_per_device(tree) for name, tree in kinds.items()}


def kv_cache_bytes(
    *, layers: int, rows: int, length: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> int:
    """Bytes of a key-value cache on all devices; int8 adds a float32 scale per head and slot."""
    per_head = head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * layers * rows * length * kv_heads * per_head


def check(
    what: str, parts: Mapping[str, float], capacity: float | None, advice: Callable[[], str]
) -> None:
    """Checks a lower bound of the required memory, before anything is loaded or compiled.

    Args:
        what: subject of the error message.
        parts: {kind: bytes per device}, without activations.
        capacity: available bytes per device; None skips the check.
        advice: returns what to change; called only if the parts do not fit.

    Raises:
        CapacityError: the parts exceed the capacity.
    """
    needed = sum(parts.values())
    if capacity is None or needed <= capacity:
        return
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    raise CapacityError(
        f"{what} needs at least {needed / GIB:.2f} GiB per device ({listed}), "
        f"but only {capacity / GIB:.2f} GiB is available; {advice()}"
    )
