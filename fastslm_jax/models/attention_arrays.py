"""What the attention kernels share: the mask, padding, and running per device.

Shapes: b batch, t time.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


@flax.struct.dataclass
class CausalSegments:
    """Causal mask within segments, not materialized.

    segment_ids: [b, t]; None for one segment.
    """

    segment_ids: jax.Array | None = None


def pad(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """Pads an axis at its end to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def segment_ids(mask: CausalSegments | None, x: jax.Array) -> jax.Array:
    """Segment ids [b, t] of an array [b, t, ...]. Pad them with -1: padding is a segment."""
    ids = None if mask is None else mask.segment_ids
    return jnp.zeros(x.shape[:2], jnp.int32) if ids is None else ids


def shard(
    mesh: Mesh | None,
    function: Callable[..., jax.Array],
    in_axes: tuple[tuple[str | None, ...], ...],
    out_axes: tuple[str | None, ...] | tuple[tuple[str | None, ...], ...],
) -> Callable[..., jax.Array]:
    """Runs a function per device of the mesh.

    Axes: mesh axes of the dimensions after the rows; a tuple of them for several results.
    """
    if mesh is None:
        return function

    def sharded(*arrays: jax.Array) -> jax.Array:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        # Batches that are not divisible, such as a small evaluation batch, are replicated.
        rows = ("data", "fsdp") if arrays[0].shape[0] % shards == 0 else None
        is_several = bool(out_axes) and isinstance(out_axes[0], tuple)
        specs = [PartitionSpec(rows, *axes) for axes in (out_axes if is_several else (out_axes,))]
        out_specs = tuple(specs) if is_several else specs[0]
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(PartitionSpec(rows, *axes) for axes in in_axes),
            out_specs=out_specs,
            check_vma=False,
        )(*arrays)

    return sharded
