"""Reads a compiled program's HLO text: its instructions, and how often each runs in one execution."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
BYTES |= {
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "token": 0,
    "opaque": 0,
}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%?([\w.\-]+)")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def shape_bytes(text: str) -> tuple[list[float], list[float]]:
    """Bytes of every array in a shape's text, and those of them that lie in the chip's main memory (layouts name other memory
    spaces, such as S(1), the on-chip one).

    Example: "(bf16[2,3]{1,0}, f32[4]{0:S(1)})" → [12, 16], [12, 0].
    """
    sizes, in_memory = [], []
    for kind, dims, layout in _SHAPE.findall(text):
        if kind in BYTES:
            size = BYTES[kind] * math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
            sizes.append(size)
            in_memory.append(0 if "S(" in layout else size)
    return sizes, in_memory


@dataclasses.dataclass(frozen=True)
class Instruction:
    """shapes: bytes of its results; operands: names; arguments: the text between the brackets; attributes: all behind them;
    bytes: of its results, as far as they lie in main memory."""

    name: str
    opcode: str
    shapes: tuple[float, ...]
    bytes: float
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool = False

    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        names = _CALLS.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += _NAME.findall(branches)
        return names


class Program:
    """computations: {name: its instructions}; entry: the name of the one that runs first."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if line and not line[0].isspace() and line.rstrip().endswith("{") and "(" in line:
                is_entry = line.startswith("ENTRY")
                name = _NAME.match(line.removeprefix("ENTRY").strip())[1]
                current = self.computations[name] = []
                self.entry = name if is_entry else self.entry
            elif (
                line == "}"
            ):  # a kernel's attributes take several lines, which may begin with a bracket too
                current = None
            elif current is not None and " = " in line and (instruction := _parse(line)):
                current.append(instruction)
        if not self.entry:
            raise ValueError("no ENTRY computation: this is no HLO text")

    def runs(self) -> dict[str, int]:
        """{computation: how often it runs}. A while loop's body runs as often as the compiler says; one branch of a conditional
        does, and all are counted.

        Raises:
            ValueError: a loop whose trip count the compiler does not know.
        """
        runs = collections.Counter({self.entry: 1})
        for name in self._callers_first():
            for instruction in self.computations[name]:
                times = runs[name]
                if instruction.opcode == "while":
                    times *= self.trip_count(instruction, name)
                for called in instruction.called():
                    runs[called] += times
        return runs

    def trip_count(self, loop: Instruction, computation: str) -> int:
        """How often a loop runs: as the compiler says, or from its counter's start, step and end.

        Raises:
            ValueError: neither is known.
        """
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        condition = {part.name: part for part in self.computations[_attribute(loop, "condition")]}
        body = {part.name: part for part in self.computations[_attribute(loop, "body")]}
        around = {part.name: part for part in self.computations[computation]}
        test = next(part for part in condition.values() if part.is_root)
        counter, end = (condition.get(name) for name in (*test.operands, None, None)[:2])
        if (
            "direction=LT" not in test.attributes
            or not counter
            or not end
            or end.opcode != "constant"
        ):
            raise ValueError(
                f"the loop {loop.name} of the compiled program has no known trip count"
            )
        index = int(re.search(r"index=(\d+)", counter.attributes)[1])
        start = _constant(around.get(around[loop.operands[0]].operands[index]), around)
        following = body.get(next(part for part in body.values() if part.is_root).operands[index])
        steps = (
            []
            if following is None
            else [_constant(body.get(name), body) for name in following.operands]
        )
        step = next((size for size in steps if size is not None), 1)
        return -(-(int(end.arguments) - (start or 0)) // step)

    def _callers_first(self) -> list[str]:
        order, seen = [], set()

        def visit(name):
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for instruction in self.computations[name]:
                for called in instruction.called():
                    visit(called)
            order.append(name)

        visit(self.entry)
        return order[::-1]

    def executed(self) -> Iterator[tuple[Instruction, str, int]]:
        """Every instruction with its computation's name and how often it runs."""
        for name, times in self.runs().items():
            for instruction in self.computations.get(name, ()):
                yield instruction, name, times


def _parse(line: str) -> Instruction | None:
    """One line of a computation."""
    left, _, right = line.strip().partition(" = ")
    name = left.removeprefix("ROOT ").lstrip("%")
    end = (
        _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    )  # a tuple of shapes, or one
    shape, rest = right[:end], right[end:].lstrip()
    opcode = re.match(r"[\w\-]+", rest)
    if not opcode or not rest[opcode.end() :].startswith("("):
        return None
    close = _closing(rest, opcode.end())
    arguments = rest[opcode.end() + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    is_root = left.startswith("ROOT ")
    sizes, in_memory = shape_bytes(shape)
    return Instruction(
        name,
        opcode[0],
        tuple(sizes),
        sum(in_memory),
        operands,
        arguments,
        rest[close + 1 :],
        is_root,
    )


def _attribute(instruction: Instruction, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)[1]


def _constant(instruction: Instruction | None, by_name: dict[str, Instruction]) -> int | None:
    """The whole number that an instruction is, or a copy of."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = by_name.get(instruction.operands[0])
    is_number = (
        instruction is not None
        and instruction.opcode == "constant"
        and re.fullmatch(r"-?\d+", instruction.arguments)
    )
    return int(instruction.arguments) if is_number else None


def _closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


# -------------------------------------------------------------------------------------------------------------- traffic

# Instructions that move nothing: they name, or begin what another instruction ends.
_SILENT = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
}
_SILENT |= {
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "async-start",
    "async-update",
    "async-done",
    "iota",
}
_FUSED = {
    "fusion",
    "reduce",
    "map",
    "sort",
    "scatter",
    "select-and-scatter",
    "reduce-window",
    "all-reduce",
    "reduce-scatter",
}


def traffic(program: Program) -> float:
    """Bytes that the instructions of a run read from and write to a chip's main memory. A fusion counts as one instruction, of a
    slice only what is sliced. A kernel's operands count once, however often it reads them.
    """
    inside_others = {
        called
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.opcode.removesuffix("-start") in _FUSED
        for called in instruction.called()
    }
    total = 0.0
    for name, runs in program.runs().items():
        if name in inside_others or name not in program.computations:
            continue
        by_name = {instruction.name: instruction for instruction in program.computations[name]}
        for instruction in by_name.values():
            if instruction.opcode not in _SILENT and not instruction.opcode.endswith("-done"):
                total += runs * (
                    _written(program, instruction, by_name) + _read(program, instruction, by_name)
                )
    return total


def _written(program: Program, instruction: Instruction, by_name: dict[str, Instruction]) -> float:
    if instruction.opcode == "dynamic-update-slice":  # in place
        return (
            by_name[instruction.operands[1]].bytes
            if instruction.operands[1] in by_name
            else instruction.bytes
        )
    if (
        instruction.opcode == "bitcast"
        and instruction.operands
        and instruction.operands[0] in by_name
    ):
        return _written(program, by_name[instruction.operands[0]], by_name)
    if instruction.opcode == "tuple":
        return sum(
            _written(program, by_name[name], by_name)
            for name in instruction.operands
            if name in by_name
        )
    if instruction.opcode == "parameter":  # a fusion that hands on what it was given
        return 0.0
    if instruction.opcode == "fusion":
        body = {
            part.name: part
            for called in instruction.called()
            for part in program.computations.get(called, ())
        }
        roots = [part for part in body.values() if part.is_root]
        return sum(_written(program, root, body) for root in roots) if roots else instruction.bytes
    return instruction.bytes


def _read(program: Program, instruction: Instruction, by_name: dict[str, Instruction]) -> float:
    if instruction.opcode in ("dynamic-slice", "gather"):
        return instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return by_name[instruction.operands[1]].bytes if instruction.operands[1] in by_name else 0.0
    if instruction.opcode != "fusion":
        return sum(by_name[name].bytes for name in instruction.operands if name in by_name)
    sizes = [by_name[name].bytes if name in by_name else 0.0 for name in instruction.operands]
    return sum(
        min(size, _read_of_parameter(program, instruction, index, size))
        for index, size in enumerate(sizes)
    )


def _read_of_parameter(program: Program, fusion: Instruction, index: int, size: float) -> float:
    """Bytes that a fusion reads of one operand: slices of it, if nothing else uses it."""
    body = [part for called in fusion.called() for part in program.computations.get(called, ())]
    names = {
        part.name
        for part in body
        if part.opcode == "parameter" and part.arguments.strip() == str(index)
    }
    total, waiting = 0.0, sorted(names)
    while waiting:
        name = waiting.pop()
        for part in body:
            if name not in part.operands:
                continue
            if part.opcode == "bitcast":
                waiting.append(part.name)
            elif part.opcode in ("dynamic-slice", "gather") and part.operands[0] == name:
                total += part.bytes
            elif part.opcode == "dynamic-update-slice" and part.operands[0] == name:
                continue
            elif part.opcode == "fusion":
                total += sum(
                    _read_of_parameter(program, part, at, size)
                    for at, operand in enumerate(part.operands)
                    if operand == name
                )
            else:
                return size
    return total
