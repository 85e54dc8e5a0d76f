"""The device mesh, and the sharding of parameters, activations and batches."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastslm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # batches: rows are sharded over both axes

# Parameter path → PartitionSpec; the first match applies. Kernels are [in, out], with a leading
# layer dimension if they are stacked. fsdp shards the model width; tensor shards attention heads
# and MLP columns.
PARAMETER_TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r"llm/(embed_tokens|lm_head)", PartitionSpec("tensor", "fsdp")),
    (
        r".*/layers/(.*/)?(query|key|value|gate|up|mlp_in)/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (r".*/layers/(.*/)?(out|down|mlp_out)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r".*/lora_a", PartitionSpec(None, "fsdp", None)),
    (r".*/lora_b", PartitionSpec(None, None, "fsdp")),
    (r".*/conv[12]/kernel", PartitionSpec(None, "fsdp", None)),
    (r"(hfq_former|adapter)/.*/kernel", PartitionSpec("fsdp", None)),
    (r".*/(bias|scale|query|positions|query_positions|context_positions)", PartitionSpec()),
)

# Logical axis → mesh axes; axes that are not listed are replicated. This makes XLA all-gather the
# weights of a layer over fsdp where they are used. Without it, XLA may all-gather activations,
# which are much larger.
ACTIVATION_TABLE: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("rows", ("data", "fsdp")),
    # Outputs of column-parallel projections, inputs of row-parallel ones.
    *((f"{name}_columns", "tensor") for name in ("query", "key", "value", "gate", "up", "mlp_in")),
    *((f"{name}_inputs", "tensor") for name in ("out", "down", "mlp_out")),
)


@contextlib.contextmanager
def activations_on(mesh: Mesh | None) -> Iterator[None]:
    """Shards the activations traced inside according to ACTIVATION_TABLE.

    Does nothing if the mesh is None or has one device.
    """
    if mesh is None or mesh.size == 1:
        yield
        return
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        nn.logical_axis_rules(ACTIVATION_TABLE),
    ):
        yield


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Creates a mesh over all devices. At most one axis may be -1: its size is inferred.

    TPU slices are split along `data`, so that only gradients are reduced over the network between
    them.

    Raises:
        UserError: the product of the axes is not the number of devices, or `data` is not a
            multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    requested = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    free = [axis for axis, size in requested.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in requested.values()):
        raise UserError(f"config.mesh {requested}: sizes must be positive; at most one may be -1")
    fixed = math.prod(size for size in requested.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"config.mesh {requested} does not fit {len(devices)} devices: the product of the "
            f"sizes must be {len(devices)}; the nearest mesh is "
            f"{nearest_mesh(requested, len(devices))}"
        )
    shape = {
        axis: len(devices) // fixed if size == -1 else size for axis, size in requested.items()
    }
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape["data"] % slices:
        raise UserError(
            f"config.mesh {shape}: data must be a multiple of the number of slices, {slices}"
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(tuple(shape.values()), AXES, devices=devices, axis_types=axis_types)
    ordered = mesh_utils.create_hybrid_device_mesh(
        (shape["data"] // slices, shape["fsdp"], shape["tensor"]),
        (slices, 1, 1),
        devices=devices,
        allow_split_physical_axes=True,
    )
    return Mesh(ordered, AXES, axis_types=axis_types)


def nearest_mesh(requested: Mapping[str, int], devices: int) -> dict[str, int]:
    """The mesh of `devices` devices nearest to the requested sizes (-1: any), by their ratios."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    shapes = [
        (a, b, devices // (a * b)) for a in divisors for b in divisors if devices % (a * b) == 0
    ]

    def distance(shape: tuple[int, ...]) -> float:
        return sum(
            abs(math.log(size / wanted))
            for size, wanted in zip(shape, requested.values(), strict=True)
            if wanted > 0
        )

    return dict(zip(AXES, min(shapes, key=distance), strict=True))


def parameter_shardings(
    leaves: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Returns {path: sharding} according to PARAMETER_TABLE.

    Raises:
        UserError: a path has no pattern, a pattern uses a mesh axis twice, or a dimension is not
            divisible by its mesh axis.
    """
    shardings = {}
    for path, leaf in leaves.items():
        spec = next(
            (spec for pattern, spec in PARAMETER_TABLE if re.fullmatch(pattern, path)), None
        )
        if spec is None:
            raise UserError(
                f"parameter {path} {leaf.shape} matches no pattern of sharding.PARAMETER_TABLE; "
                "add one"
            )
        names = [name for name in spec if name is not None]
        if len(names) > len(set(names)):
            raise UserError(
                f"parameter {path} {leaf.shape}: sharding.PARAMETER_TABLE assigns two dimensions "
                f"to one mesh axis, {spec}; use each axis once"
            )
        for axis, name in enumerate(spec):
            if name is not None and leaf.shape[axis] % mesh.shape[name]:
                nearest = nearest_divisors(leaf.shape[axis], mesh.shape[name])
                raise UserError(
                    f"parameter {path} {leaf.shape}: dimension {axis} is not divisible by "
                    f"{name}={mesh.shape[name]}; set config.mesh.{name} to a divisor of "
                    f"{leaf.shape[axis]}, for example {' or '.join(map(str, nearest))}"
                )
        shardings[path] = NamedSharding(mesh, spec)
    return shardings


def check_batch(global_rows: int, accumulate: int, mesh: Mesh) -> None:
    """Checks that the rows of a batch can be split over devices and micro-batches.

    Raises:
        UserError: they cannot; the message has the nearest batch size that can.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_rows % (shards * accumulate):
        nearest = max(1, round(global_rows / (shards * accumulate))) * shards * accumulate
        raise UserError(
            f"config.global_batch_size={global_rows} is not divisible by data × fsdp × accumulate "
            f"= {shards} × {accumulate}; the nearest valid size is {nearest}"
        )


def nearest_divisors(number: int, near: int) -> list[int]:
    """Divisors of a number next to `near`, below and above. Example: 24, near 5 → [4, 6]."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    below = [size for size in divisors if size <= near]
    above = [size for size in divisors if size > near]
    return below[-1:] + above[:1]


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assembles global arrays from the rows of each process, sharded over data × fsdp."""
    sharding = NamedSharding(mesh, ROWS)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
