"""Parses the HLO text of a compiled program: computations, instructions and execution counts."""

import collections
import copy
import dataclasses
import math
import re
from collections.abc import Iterator

# Bytes per element.
BYTES = {
    **dict.fromkeys(("token", "opaque"), 0),
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_NAME = re.compile(r"%?([\w.\-]+)")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TABLE_ROW = re.compile(r"(\d+) (\{.*\}|\".*\")")  # of the tables of source locations


def shape_bytes(text: str) -> tuple[list[float], list[float]]:
    """Bytes of every array in a shape, and the bytes that it takes in HBM.

    A layout with a memory space, such as S(1), is not in HBM. A TPU stores tiles, such as T(8,128)
    of the two most minor dimensions, which are padded to whole tiles.
    Example: "(bf16[2,3]{1,0}, f32[4]{0:S(1)}, f32[3,64]{1,0:T(8,128)})" → [12, 16, 768],
    [12, 0, 4096].
    """
    sizes, in_hbm = [], []
    for kind, dims, layout in _SHAPE.findall(text):
        if kind in BYTES:
            shape = [int(dim.lstrip("<=")) for dim in dims.split(",") if dim]
            sizes.append(BYTES[kind] * math.prod(shape))
            in_hbm.append(0 if "S(" in layout else BYTES[kind] * math.prod(_padded(shape, layout)))
    return sizes, in_hbm


def _padded(shape: list[int], layout: str) -> list[int]:
    """The shape with the tiled dimensions padded. Example: [3, 64], "{1,0:T(8,128)}" → [8, 128]."""
    tile = _TILE.search(layout)
    if not tile or not shape:
        return shape
    sizes = reversed([int(size) for size in tile[1].split(",")])
    minor_to_major = [int(axis) for axis in layout[1 : layout.index(":")].split(",")]
    padded = list(shape)
    for axis, size in zip(minor_to_major, sizes, strict=False):
        padded[axis] += -padded[axis] % size
    return padded


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction."""

    name: str
    opcode: str
    result_bytes: tuple[float, ...]  # of every array of the result
    result_hbm_bytes: tuple[float, ...]  # in HBM: without on-chip memory, with the tiles' padding
    operands: tuple[str, ...]  # names of instructions
    arguments: str  # text between the parentheses
    attributes: str  # text after the parentheses
    is_root: bool = False

    @property
    def hbm_bytes(self) -> float:
        return sum(self.result_hbm_bytes)

    def called(self) -> list[str]:
        """Names of the computations that the instruction calls."""
        names = _CALLS.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += _NAME.findall(branches)
        return names


class Program:
    """A compiled program.

    Attributes:
        computations: {name: instructions}.
        entry: name of the entry computation.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = {}
        current = table = None
        for line in text.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables[line] = {}
            elif table is not None and (row := _TABLE_ROW.fullmatch(line)):
                table[int(row[1])] = row[2]
            if line and not line[0].isspace() and line.rstrip().endswith("{") and "(" in line:
                is_entry = line.startswith("ENTRY")
                name = _NAME.match(line.removeprefix("ENTRY").strip())[1]
                current = self.computations[name] = []
                self.entry = name if is_entry else self.entry
            elif line == "}":  # kernel attributes span lines, which may also start with a brace
                current = None
            elif current is not None and " = " in line and (instruction := _parse(line)):
                current.append(instruction)
        if not self.entry:
            raise ValueError("the text is not HLO: it has no ENTRY computation")

    def execution_counts(self, unknown_trips: int | None = None) -> dict[str, int]:
        """Returns {computation: how often one execution of the program runs it}.

        A loop body is multiplied by its trip count. All branches of a conditional are counted,
        although only one of them runs.

        Args:
            unknown_trips: the trip count of loops whose trip count is unknown.

        Raises:
            ValueError: the trip count of a loop is unknown, and unknown_trips is None.
        """
        counts = collections.Counter({self.entry: 1})
        for name in self._topological_order():
            for instruction in self.computations[name]:
                times = counts[name]
                if instruction.opcode == "while":
                    try:
                        times *= self.trip_count(instruction, name)
                    except ValueError:
                        if unknown_trips is None:
                            raise
                        times *= unknown_trips
                for called in instruction.called():
                    counts[called] += times
        return counts

    def body(self, loop: Instruction) -> "Program":
        """One iteration of a while loop, as a program of its own."""
        body = copy.copy(self)
        body.entry = _attribute(loop, "body")
        return body

    def source(self, instruction: Instruction) -> str:
        """The line of this package of an instruction: "models/decoder.py:62", or ""."""
        frame = _number(instruction.attributes, "stack_frame_id")
        while frame:
            entry = self._tables.get("StackFrames", {}).get(frame, "")
            location = self._tables["FileLocations"].get(_number(entry, "file_location_id"), "")
            name = self._tables["FileNames"].get(_number(location, "file_name_id"), "").strip('"')
            if "/fastslm_jax/" in name:
                return f"{name.rpartition('/fastslm_jax/')[2]}:{_number(location, 'line')}"
            frame = _number(entry, "parent_frame_id") - 1  # printed with an offset of 1
        return ""

    def instructions(self) -> Iterator[tuple[Instruction, str, int]]:
        """Yields every instruction with its computation and its execution count."""
        for name, count in self.execution_counts().items():
            for instruction in self.computations.get(name, ()):
                yield instruction, name, count

    def trip_count(self, loop: Instruction, computation: str) -> int:
        """Trip count of a while loop: annotated, or from the start, step and end of its counter.

        Args:
            loop: the while instruction.
            computation: name of the computation that contains it.

        Raises:
            ValueError: the trip count is unknown.
        """
        if found := _TRIP_COUNT.search(loop.attributes):
            return int(found[1])
        condition = {i.name: i for i in self.computations[_attribute(loop, "condition")]}
        body = {i.name: i for i in self.computations[_attribute(loop, "body")]}
        caller = {i.name: i for i in self.computations[computation]}
        test = next(i for i in condition.values() if i.is_root)
        counter, end = (condition.get(name) for name in (*test.operands, None, None)[:2])
        is_less_than = "direction=LT" in test.attributes
        if not is_less_than or not counter or not end or end.opcode != "constant":
            raise ValueError(f"the trip count of the HLO loop {loop.name} is unknown")
        index = int(re.search(r"index=(\d+)", counter.attributes)[1])
        start = _constant(caller.get(caller[loop.operands[0]].operands[index]), caller)
        root = next(i for i in body.values() if i.is_root)
        increment = body.get(root.operands[index])
        addends = () if increment is None else increment.operands
        steps = [_constant(body.get(name), body) for name in addends]
        step = next((size for size in steps if size is not None), 1)
        return -(-(int(end.arguments) - (start or 0)) // step)

    def _topological_order(self) -> list[str]:
        """Names of the reachable computations, callers before callees."""
        postorder, seen = [], set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for instruction in self.computations[name]:
                for called in instruction.called():
                    visit(called)
            postorder.append(name)

        visit(self.entry)
        return postorder[::-1]


def _parse(line: str) -> Instruction | None:
    """Parses "%name = shape opcode(arguments), attributes"; None for any other line."""
    left, _, right = line.strip().partition(" = ")
    is_tuple = right.startswith("(")
    end = _closing(right, 0) + 1 if is_tuple else right.find(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode = re.match(r"[\w\-]+", rest)
    if not opcode or not rest[opcode.end() :].startswith("("):
        return None
    close = _closing(rest, opcode.end())
    arguments = rest[opcode.end() + 1 : close]
    sizes, in_hbm = shape_bytes(shape)
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode[0],
        result_bytes=tuple(sizes),
        result_hbm_bytes=tuple(in_hbm),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[close + 1 :],
        is_root=left.startswith("ROOT "),
    )


def _number(text: str, name: str) -> int:
    """The number after "name="; 0 if there is none."""
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else 0


def _attribute(instruction: Instruction, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)[1]


def _constant(instruction: Instruction | None, by_name: dict[str, Instruction]) -> int | None:
    """Value of an integer constant or of a copy of one; None for anything else."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = by_name.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return len(text)
