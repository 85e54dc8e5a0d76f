"""HBM traffic of a compiled program."""

import dataclasses

from fastslm_jax.plan.hlo import Instruction, Program

# Instructions without traffic: they only rename data, or another instruction does the work.
_NO_TRAFFIC = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast"),
    *("while", "conditional", "call", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "optimization-barrier", "async-start", "async-update", "async-done"),
}
# Instructions whose called computations add no traffic.
_FUSED = {
    *("fusion", "reduce", "map", "sort", "scatter", "select-and-scatter", "reduce-window"),
    *("all-reduce", "reduce-scatter"),
}
# Transfers, and which part of their results is written.
_STARTS = {"copy-start": 0, "all-gather-start": 1, "collective-permute-start": 1}
_SLICES = ("slice", "dynamic-slice", "gather")
# Updates in place, and which of their operands has the new values.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """HBM traffic of one instruction."""

    instruction: Instruction
    count: int  # executions
    bytes_moved: float  # read and written, per execution

    @property
    def total(self) -> float:
        return self.count * self.bytes_moved


def hbm_traffic(program: Program) -> float:
    """Bytes that one execution reads from and writes to the HBM of a device.

    A fusion counts as one instruction. Slices count only the bytes that are sliced. Operands of a
    custom kernel count once, even if the kernel reads them several times. The workspace of a cuBLAS
    product is not counted.
    """
    return sum(entry.total for entry in by_instruction(program))


def by_instruction(program: Program, unknown_trips: int | None = None) -> list[Traffic]:
    """The traffic of every instruction, largest total first.

    unknown_trips: see `hlo.Program.execution_counts`.
    """
    fused = {
        called
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.opcode.removesuffix("-start") in _FUSED
        for called in instruction.called()
    }
    found = []
    for name, count in program.execution_counts(unknown_trips).items():
        if name in fused or name not in program.computations:
            continue
        by_name = {instruction.name: instruction for instruction in program.computations[name]}
        for instruction in by_name.values():
            if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith("-done"):
                continue
            written = _written(program, instruction, by_name)
            moved = written + _read(program, instruction, by_name)
            found.append(Traffic(instruction, count, moved))
    return sorted(found, key=lambda entry: -entry.total)


def _written(
    program: Program,
    instruction: Instruction,
    by_name: dict[str, Instruction],
    is_fused: bool = False,
) -> float:
    operands = [by_name[name] for name in instruction.operands if name in by_name]
    updated = operands[0] if instruction.opcode in _UPDATES and operands else None
    while updated is not None and updated.opcode == "bitcast":
        updated = by_name.get(updated.operands[0])
    # In place, unless its fusion computes the array that is updated.
    if instruction.opcode in _UPDATES and (not is_fused or updated.opcode == "parameter"):
        update = by_name.get(instruction.operands[_UPDATES[instruction.opcode]])
        return update.hbm_bytes if update else instruction.hbm_bytes
    if instruction.opcode == "custom-call" and "__cublas$" in instruction.attributes:
        return instruction.result_bytes[0]  # the others are workspace
    if instruction.opcode == "custom-call" and '"AllocateBuffer"' in instruction.attributes:
        return 0.0
    if instruction.opcode in _STARTS:  # the result also has the operand and a context
        return instruction.result_hbm_bytes[_STARTS[instruction.opcode]]
    if instruction.opcode == "bitcast" and operands:
        return _written(program, operands[0], by_name, is_fused)
    if instruction.opcode == "tuple":
        return sum(_written(program, operand, by_name, is_fused) for operand in operands)
    if instruction.opcode == "parameter":  # a fusion that returns its operand
        return 0.0
    if instruction.opcode == "fusion":
        body = {inner.name: inner for inner in _called_instructions(program, instruction)}
        roots = [inner for inner in body.values() if inner.is_root]
        if roots:
            return sum(_written(program, root, body, is_fused=True) for root in roots)
    return instruction.hbm_bytes


def _read(program: Program, instruction: Instruction, by_name: dict[str, Instruction]) -> float:
    if instruction.opcode in _SLICES:
        return instruction.hbm_bytes
    sizes = [by_name[name].hbm_bytes if name in by_name else 0.0 for name in instruction.operands]
    if instruction.opcode in _UPDATES:
        return sizes[_UPDATES[instruction.opcode]]
    if instruction.opcode != "fusion":
        return sum(sizes)
    return sum(
        min(size, _read_of_operand(program, instruction, index, size))
        for index, size in enumerate(sizes)
    )


def _read_of_operand(program: Program, fusion: Instruction, index: int, size: float) -> float:
    """Bytes a fusion reads of one operand: its slices if all uses are slices, else all of it."""
    body = _called_instructions(program, fusion)
    pending = [
        inner.name
        for inner in body
        if inner.opcode == "parameter" and inner.arguments.strip() == str(index)
    ]
    total = 0.0
    while pending:
        name = pending.pop()
        for user in body:
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                pending.append(user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += user.hbm_bytes
            elif user.opcode in _UPDATES and user.operands[0] == name:
                continue
            elif user.opcode == "fusion":
                total += sum(
                    _read_of_operand(program, user, position, size)
                    for position, operand in enumerate(user.operands)
                    if operand == name
                )
            else:
                return size
    return total


def _called_instructions(program: Program, instruction: Instruction) -> list[Instruction]:
    return [
        inner for called in instruction.called() for inner in program.computations.get(called, ())
    ]
