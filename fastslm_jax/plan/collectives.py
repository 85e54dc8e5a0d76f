"""Collectives of a compiled program: bytes sent per chip, and a lower bound on their time.

Bytes are those of a ring algorithm, which sends the least. With n chips per group, a chip sends
(n - 1) / n of the full array for an all-gather, reduce-scatter or all-to-all, twice that for an
all-reduce, and the whole array for a collective-permute.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from fastslm_jax.chips import WRAPAROUND, Chip, node_of
from fastslm_jax.plan import hlo

BETWEEN_SLICES = "between slices"  # over DCN
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    BETWEEN_SLICES,
)
# Forms of replica groups: a reshaped and transposed iota, mesh axes, lists, and pairs.
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" ?\{([^}]*)\}"
)
_LISTS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of one train step."""

    kind: str
    name: str
    count: int  # executions per step
    result_bytes: float  # per chip
    groups: tuple[tuple[int, ...], ...]  # device numbers
    origin: str = ""  # op_name in the traced function

    @property
    def group_size(self) -> int:
        return max(map(len, self.groups))

    @property
    def bytes_sent(self) -> float:
        """Bytes a chip sends per execution."""
        n = self.group_size
        if n == 1:
            return 0.0
        share = {
            "all-gather": (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,  # the result is 1 / n of the full array
            "collective-permute": 1.0,
            BETWEEN_SLICES: 2 * (n - 1) / n,  # an all-reduce of each chip's shard
        }
        return share[self.kind] * self.result_bytes

    @property
    def bytes_per_step(self) -> float:
        """Bytes a chip sends in all executions of a step."""
        return self.count * self.bytes_sent


def find(program: hlo.Program, num_devices: int, num_slices: int = 1) -> list[Collective]:
    """Finds the collectives of a program.

    Transfers between slices are sends through the hosts (Megascale). The TPU compiler may split a
    collective over several fusions to overlap it with matrix products. These share a channel, and
    the collective is counted once.

    Args:
        num_devices: devices per slice.
        num_slices: slices of the topology.
    """
    fused = {
        called
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.opcode == "fusion"
        for called in instruction.called()
    }
    found: dict[str, Collective] = {}
    for instruction, computation, count in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and "xla_megascale_runtime" in instruction.attributes:
            groups = (tuple(range(num_slices)),)
            size = instruction.result_bytes[0]
            found[instruction.name] = Collective(
                BETWEEN_SLICES, instruction.name, count, size, groups
            )
        if kind not in KINDS:
            continue
        groups = _groups(instruction.attributes, num_devices)
        size = _result_bytes(instruction)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            # On TPU, a reduce-scatter is a fusion of an all-reduce and a slice.
            kind, size = "reduce-scatter", size / max(map(len, groups))
        channel = _CHANNEL.search(instruction.attributes)
        key = f"channel {channel[1]}" if channel and computation in fused else instruction.name
        if key in found:
            count = max(count, found[key].count)
        origin = _OP_NAME.search(instruction.attributes)
        found[key] = Collective(
            kind, instruction.name, count, size, groups, origin[1] if origin else ""
        )
    return list(found.values())


def _result_bytes(instruction: hlo.Instruction) -> float:
    """Bytes of a collective's results. Most async starts return (operands, results, flags)."""
    sizes = instruction.result_bytes
    is_start = instruction.opcode.endswith("-start")
    if is_start and instruction.opcode != "all-reduce-start" and len(sizes) > 1:
        count = max(1, len(instruction.operands))
        sizes = sizes[count : 2 * count]
    return sum(sizes)


def _groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Device groups of a collective; all devices if the attributes have none."""
    if match := _MESH.search(attributes):
        axes, dims, order, reduced = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        dims = dims or str(math.prod(sizes.values()))
        numbers = _iota(dims, order).reshape(tuple(sizes.values()))
        inner = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", reduced)]
        outer = [axis for axis in range(len(sizes)) if axis not in inner]
        size = math.prod(numbers.shape[axis] for axis in inner)
        return _to_tuples(numbers.transpose(outer + inner).reshape(-1, size))
    if match := _IOTA.search(attributes):
        shape, dims, order = match.groups()
        return _to_tuples(_iota(dims, order).reshape([int(size) for size in shape.split(",")]))
    if match := _LISTS.search(attributes) or _PAIRS.search(attributes):
        groups = re.findall(r"\{([\d,]+)\}", match[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    return (tuple(range(num_devices)),)


def _to_tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, groups.tolist()))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """An HLO iota. Example: "2,4" and "1,0" → 0 to 7 as [2, 4], transposed."""
    shape = [int(size) for size in dims.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers


def bytes_by_network(collective: Collective, devices: Sequence[jax.Device]) -> dict[str, float]:
    """Bytes that a chip sends in all executions of a step, as {"ici": ..., "dcn": ...}.

    "ici" is the network within a TPU slice, or the NVLink of a node of GPUs; "dcn" is the network
    between slices or nodes. Across slices, the chips of a slice first combine their data; then each
    chip sends its share over DCN.
    """
    sent = collective.bytes_per_step
    if collective.kind == BETWEEN_SLICES:
        return {"ici": 0.0, "dcn": sent}
    group = [devices[number] for number in max(collective.groups, key=len)]
    if len(group) == 1 or not sent:
        return {"ici": 0.0, "dcn": 0.0}
    slices = len(set(map(node_of, group)))
    per_slice = len(group) // slices
    # A hierarchical ring of n chips: first within a slice, then across slices on 1 / n of the data.
    within = (per_slice - 1) / per_slice
    across = (slices - 1) / slices / per_slice
    full = sent / (within + across)
    return {"ici": full * within, "dcn": full * across}


def seconds(collective: Collective, devices: Sequence[jax.Device], chip: Chip) -> dict[str, float]:
    """Lower bound on the time of all executions in a step, as {"ici": ..., "dcn": ...}.

    Within a slice, a group uses the ICI links of the torus axes it spans. An axis without
    wraparound links has half the bandwidth of a ring.
    """
    sent = bytes_by_network(collective, devices)
    if not sent["ici"]:
        return {"ici": 0.0, "dcn": sent["dcn"] / chip.dcn_bandwidth}
    group = [devices[number] for number in max(collective.groups, key=len)]
    return {
        "ici": sent["ici"] / _ici_bandwidth(group, devices, chip),
        "dcn": sent["dcn"] / chip.dcn_bandwidth,
    }


def _ici_bandwidth(group: Sequence[jax.Device], devices: Sequence[jax.Device], chip: Chip) -> float:
    """Bytes per second a chip can send to the other chips of its group in a slice."""
    if not chip.torus or not hasattr(group[0], "coords"):
        return chip.ici_bandwidth
    extents = np.ptp([device.coords for device in devices], axis=0) + 1
    is_spanned = np.ptp([device.coords for device in group], axis=0) > 0
    axes = [size for size, spanned in zip(extents, is_spanned, strict=True) if spanned]
    links = sum(1.0 if size % WRAPAROUND[chip.torus] == 0 else 0.5 for size in axes)
    return chip.ici_bandwidth / chip.torus * (links or 1.0)
