"""The device mesh and one table that says how every parameter lies on it."""

import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastslm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # batches: rows over both axes

# First match decides. Kernels are [in, out], stacked ones [layers, in, out]; fsdp shards the layer's width, tensor splits heads
# and MLP columns.
PARAMETER_TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r"llm/(embed_tokens|lm_head)", PartitionSpec("tensor", "fsdp")),
    (r".*/layers/(.*/)?(query|key|value|gate|up|mlp_in)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r".*/layers/(.*/)?(out|down|mlp_out)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r".*/lora_a", PartitionSpec(None, "fsdp", None)),
    (r".*/lora_b", PartitionSpec(None, None, "fsdp")),
    (r".*/conv[12]/kernel", PartitionSpec(None, "fsdp", None)),
    (r"hfq_former/.*/kernel", PartitionSpec("fsdp", None)),
    (r".*/(bias|scale|query|positions|query_positions|context_positions)", PartitionSpec()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one axis may be −1 and takes what the others leave.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = 1
    for size in shape.values():
        fixed *= size if size != -1 else 1
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"config.mesh {shape}: sizes are positive, and one at most is -1")
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    elif free or fixed != len(devices):
        raise UserError(f"config.mesh {shape} does not fit {len(devices)} devices; its sizes must multiply to that number")
    return jax.make_mesh(tuple(shape.values()), AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def parameter_shardings(leaves: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, NamedSharding]:
    """{path: sharding} by PARAMETER_TABLE.

    Raises:
        UserError: a path that no pattern matches, or a dimension that its mesh axis does not divide.
    """
    shardings = {}
    for path, leaf in leaves.items():
        spec = next((spec for pattern, spec in PARAMETER_TABLE if re.fullmatch(pattern, path)), None)
        if spec is None:
            raise UserError(f"parameter {path} {leaf.shape} matches no pattern of sharding.PARAMETER_TABLE; add one")
        for axis, name in enumerate(spec):
            if name is not None and leaf.shape[axis] % mesh.shape[name]:
                raise UserError(
                    f"parameter {path} {leaf.shape}: dimension {axis} does not divide over {name}={mesh.shape[name]}; "
                    f"choose config.mesh.{name} among the divisors of {leaf.shape[axis]}"
                )
        shardings[path] = NamedSharding(mesh, spec)
    return shardings


def check_batch(global_rows: int, accumulate: int, mesh: Mesh) -> None:
    """Rows of a batch must divide over the data axes and the micro-batches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_rows % (shards * accumulate):
        nearest = max(1, round(global_rows / (shards * accumulate))) * shards * accumulate
        raise UserError(
            f"config.batch_rows={global_rows} does not divide over data × fsdp = {shards} devices in {accumulate} micro-batches; "
            f"the nearest that does is {nearest}"
        )


def shard_batch(batch: Mapping, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows → global arrays, rows over data × fsdp."""
    sharding = NamedSharding(mesh, ROWS)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
