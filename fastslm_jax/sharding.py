"""The device mesh, one table that says how every parameter lies on it, and one for what is computed from them."""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastslm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # batches: rows over both axes

# First match decides. Kernels are [in, out], stacked ones [layers, in, out]; fsdp shards the layer's width, tensor splits heads
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
    (r"hfq_former/.*/kernel", PartitionSpec("fsdp", None)),
    (r".*/(bias|scale|query|positions|query_positions|context_positions)", PartitionSpec()),
)

# Logical names of axes inside the model → mesh axes; what is not named here is whole on every device. A layer's weights are
# gathered over fsdp where they are used: left to itself, XLA may gather activations instead, which are far larger.
ACTIVATION_TABLE: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("rows", ("data", "fsdp")),
    *(
        (f"{name}_columns", "tensor") for name in ("query", "key", "value", "gate", "up", "mlp_in")
    ),  # what a projection gives
    *(
        (f"{name}_inputs", "tensor") for name in ("out", "down", "mlp_out")
    ),  # what a projection takes
)


@contextlib.contextmanager
def activations_on(mesh: Mesh | None):
    """What is traced inside lies on the mesh by ACTIVATION_TABLE (None: one device, nothing is said)."""
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
    """A mesh over all devices; one axis may be −1 and takes what the others leave. Several TPU slices lie along `data`, so that
    only gradients cross the network between them.

    Raises:
        UserError: the axes do not multiply to the number of devices, or `data` not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    asked = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    free = [axis for axis, size in asked.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in asked.values()):
        raise UserError(f"config.mesh {asked}: sizes are positive, and one at most is -1")
    fixed = math.prod(size for size in asked.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"config.mesh {asked} does not fit {len(devices)} devices; its sizes must multiply to that number, the nearest that "
            f"do are {nearest_mesh(asked, len(devices))}"
        )
    shape = {axis: len(devices) // fixed if size == -1 else size for axis, size in asked.items()}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape["data"] % slices:
        raise UserError(
            f"config.mesh {shape}: data must be a multiple of the {slices} slices, which lie along it"
        )
    if slices == 1:
        return jax.make_mesh(
            tuple(shape.values()),
            AXES,
            devices=devices,
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
        )
    within = (shape["data"] // slices, shape["fsdp"], shape["tensor"])
    ordered = mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices=devices, allow_split_physical_axes=True
    )
    return Mesh(ordered, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def nearest_mesh(asked: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes that multiply to `devices` and are nearest to those asked for (−1: any), by their ratios."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    shapes = [
        (a, b, devices // (a * b)) for a in divisors for b in divisors if devices % (a * b) == 0
    ]

    def distance(shape):
        return sum(
            abs(math.log(size / wanted))
            for size, wanted in zip(shape, asked.values(), strict=True)
            if wanted > 0
        )

    return dict(zip(AXES, min(shapes, key=distance), strict=True))


def parameter_shardings(
    leaves: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
    """{path: sharding} by PARAMETER_TABLE.

    Raises:
        UserError: a path that no pattern matches, two dimensions on one axis, or a dimension that its mesh axis does not divide.
    """
    shardings = {}
    for path, leaf in leaves.items():
        spec = next(
            (spec for pattern, spec in PARAMETER_TABLE if re.fullmatch(pattern, path)), None
        )
        if spec is None:
            raise UserError(
                f"parameter {path} {leaf.shape} matches no pattern of sharding.PARAMETER_TABLE; add one"
            )
        names = [name for name in spec if name is not None]
        if len(names) > len(set(names)):
            raise UserError(
                f"parameter {path} {leaf.shape}: sharding.PARAMETER_TABLE puts two of its dimensions on one mesh axis, {spec}; "
                "an axis shards one dimension"
            )
        for axis, name in enumerate(spec):
            if name is not None and leaf.shape[axis] % mesh.shape[name]:
                raise UserError(
                    f"parameter {path} {leaf.shape}: dimension {axis} does not divide over {name}={mesh.shape[name]}; "
                    f"choose config.mesh.{name} among the divisors of {leaf.shape[axis]}, the nearest are "
                    f"{' and '.join(map(str, nearest_divisors(leaf.shape[axis], mesh.shape[name])))}"
                )
        shardings[path] = NamedSharding(mesh, spec)
    return shardings


def check_batch(global_rows: int, accumulate: int, mesh: Mesh) -> None:
    """Rows of a batch must divide over the data axes and the micro-batches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_rows % (shards * accumulate):
        nearest = max(1, round(global_rows / (shards * accumulate))) * shards * accumulate
        raise UserError(
            f"config.global_batch_size={global_rows} does not divide over data × fsdp = {shards} devices in {accumulate} micro-batches; "
            f"the nearest that does is {nearest}"
        )


def nearest_divisors(number: int, near: int) -> list[int]:
    """The divisors of a number next to `near`, below and above. Example: of 24, next to 5 → [4, 6]."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    below, above = (
        [size for size in divisors if size <= near][-1:],
        [size for size in divisors if size > near][:1],
    )
    return below + above


def shard_batch(batch: Mapping, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows → global arrays, rows over data × fsdp."""
    sharding = NamedSharding(mesh, ROWS)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
