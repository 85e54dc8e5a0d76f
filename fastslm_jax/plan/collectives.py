"""What a compiled program sends between chips, and how long that takes at best.

Bytes are what one chip sends in a ring, the least that any algorithm needs: (n − 1) / n of the whole for a gather, a
reduce-scatter and an all-to-all among n chips, twice that for an all-reduce, all of it for a permutation.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from fastslm_jax.chips import Chip
from fastslm_jax.plan import hlo

BETWEEN_SLICES = "between slices"
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    BETWEEN_SLICES,
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_LISTS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """runs: in one step. result: bytes of its result on one chip. groups: device numbers that exchange with each other.
    origin: where in the traced function it comes from.
    """

    kind: str
    name: str
    runs: int
    result: float
    groups: tuple[tuple[int, ...], ...]
    origin: str = ""

    @property
    def size(self) -> int:
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in one run."""
        n = self.size
        if n == 1:
            return 0.0
        share = {
            "all-gather": (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,  # its result is 1 / n of the whole
            "collective-permute": 1.0,
            BETWEEN_SLICES: 2 * (n - 1) / n,  # the slices reduce it, each chip its own part
        }
        return share[self.kind] * self.result


def find(program: hlo.Program, num_devices: int, slices: int = 1) -> list[Collective]:
    """All collectives of a program, in no particular order. Devices are numbered within a slice; what slices exchange is sent
    through their hosts (Megascale).

    The TPU compiler spreads one collective over several fusions, so that it runs beside products: each names it again, with the
    same channel. It is counted once.
    """
    fused = {
        called
        for parts in program.computations.values()
        for part in parts
        if part.opcode == "fusion"
        for called in part.called()
    }
    found: dict[str, Collective] = {}
    for instruction, computation, runs in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and "xla_megascale_runtime" in instruction.attributes:
            members = (tuple(range(slices)),)
            found[instruction.name] = Collective(
                BETWEEN_SLICES, instruction.name, runs, instruction.shapes[0], members
            )
        if kind not in KINDS:
            continue
        shapes = instruction.shapes
        if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(shapes) > 1:
            # Such a start gives back (operands, results, ...flags).
            count = max(1, len(instruction.operands))
            shapes = shapes[count : 2 * count]
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            # The TPU compiler's reduce-scatter: a fusion of an all-reduce and the slice that is kept.
            kind, shapes = (
                "reduce-scatter",
                [sum(shapes) / max(map(len, _groups(instruction.attributes, num_devices)))],
            )
        channel = _CHANNEL.search(instruction.attributes)
        key = f"channel {channel[1]}" if channel and computation in fused else instruction.name
        runs = max(runs, found[key].runs if key in found else 0)
        origin = _ORIGIN.search(instruction.attributes)
        groups = _groups(instruction.attributes, num_devices)
        found[key] = Collective(
            kind, instruction.name, runs, sum(shapes), groups, origin[1] if origin else ""
        )
    return list(found.values())


def _groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Written as a mesh with the axes that exchange, as a reshaped and transposed range, as lists, or left out (all)."""
    if match := _MESH.search(attributes):
        axes, dims, order, exchanging = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        numbers = _iota(dims or str(math.prod(sizes.values())), order).reshape(
            tuple(sizes.values())
        )
        inner = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", exchanging)]
        outer = [axis for axis in range(len(sizes)) if axis not in inner]
        size = math.prod(numbers.shape[axis] for axis in inner)
        return tuple(map(tuple, numbers.transpose(outer + inner).reshape(-1, size).tolist()))
    if match := _IOTA.search(attributes):
        shape, dims, order = match.groups()
        return tuple(
            map(
                tuple, _iota(dims, order).reshape([int(size) for size in shape.split(",")]).tolist()
            )
        )
    if match := _LISTS.search(attributes) or _PAIRS.search(attributes):
        return tuple(
            tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1])
        )
    return (tuple(range(num_devices)),)


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Device numbers as HLO writes them: "2,4" and "1,0" → the range of 8 as [2, 4], transposed."""
    shape = [int(size) for size in dims.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers


def seconds(collective: Collective, devices: Sequence[jax.Device], chip: Chip) -> dict[str, float]:
    """{"ici": …, "dcn": …}: the least time of all its runs.

    Links: a group that spans k of a torus' axes uses the links of those axes, in both directions where the axis closes to a
    ring and in one where it does not (half the bandwidth). Between slices, each chip sends its part over its own share of the
    data-centre network, after the chips of a slice have combined theirs.
    """
    bytes_sent = collective.runs * collective.sent
    if collective.kind == BETWEEN_SLICES:
        return {"ici": 0.0, "dcn": bytes_sent / chip.dcn_bandwidth}
    group = [devices[number] for number in max(collective.groups, key=len)]
    if len(group) == 1 or not bytes_sent:
        return {"ici": 0.0, "dcn": 0.0}
    slices = {getattr(device, "slice_index", 0) or 0 for device in group}
    inside = len(group) // len(slices)
    # The share of the ring's bytes that stays inside a slice: steps among its chips, then among the slices on 1 / inside each.
    between = (len(slices) - 1) / len(slices) / inside
    within = (inside - 1) / inside
    whole = bytes_sent / (within + between)
    return {
        "ici": whole * within / _links(group, devices, chip) if within else 0.0,
        "dcn": whole * between / chip.dcn_bandwidth,
    }


def _links(group: Sequence[jax.Device], devices: Sequence[jax.Device], chip: Chip) -> float:
    """Bytes/s that a chip can send to the others of its group inside a slice."""
    if not chip.torus or not hasattr(group[0], "coords"):
        return chip.ici_bandwidth
    extents = np.ptp([device.coords for device in devices], axis=0) + 1
    spans = np.ptp([device.coords for device in group], axis=0) > 0
    axes = [size for size, spanned in zip(extents, spans, strict=True) if spanned]
    rings = [1.0 if chip.wraps_from and size % chip.wraps_from == 0 else 0.5 for size in axes]
    return chip.ici_bandwidth / chip.torus * (sum(rings) or 1.0)
