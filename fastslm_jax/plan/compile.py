"""Compiles the train step of a config for a set of devices and measures the compiled program.

The step is the one that train.py runs. It is compiled from shapes alone: no weights or data are
read, and the devices do not have to exist (see `chips.Topology.devices`).
"""

import dataclasses
import pathlib
import time
from typing import Protocol

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fastslm_jax import chips, compiler, flops, memory, sharding
from fastslm_jax.memory import GIB
from fastslm_jax.plan import collectives, hlo, traffic
from fastslm_jax.plan.progress import progress
from fastslm_jax.training import experiment, specs
from fastslm_jax.training.specs import StepSpecs

HBM_SHARE = 0.85  # of a chip's HBM; the rest is for the runtime, fragmentation and evaluation


class MemoryAnalysis(Protocol):
    """Result of `jax.stages.Compiled.memory_analysis()`, in bytes per device."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    temp_size_in_bytes: int
    alias_size_in_bytes: int
    peak_memory_in_bytes: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled train step and its costs."""

    compiled: jax.stages.Compiled
    flops: int  # executed, on all devices
    trace_seconds: float
    compile_seconds: float


def set_rows(
    config: ConfigDict, devices: list[jax.Device], chip: chips.Chip | None, rows_per_chip: int
) -> None:
    """Sets config.global_batch_size for a number of rows per chip; 0 leaves it unchanged."""
    if rows_per_chip:
        num_chips = len(devices) // (chip.devices if chip else 1)
        config.global_batch_size = rows_per_chip * config.accumulate * num_chips


def plan(
    config: ConfigDict,
    devices: list[jax.Device],
    chip: chips.Chip | None,
    name: str,
    hlo_file: str = "",
) -> dict:
    """Compiles and measures the train step of a config.

    Args:
        devices: devices to compile for.
        chip: their specifications; None if unknown, which leaves all bounds None.
        name: name of the topology.
        hlo_file: if set, the optimized HLO is written to this file.

    Returns:
        The JSON object that the command prints.

    Raises:
        UserError: a dimension is not divisible, or the mesh does not fit the devices.
        memory.CapacityError: the step does not fit in memory.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    setup = experiment.build(config, weights=False, mesh=mesh)
    step = specs.build(setup, mesh)
    capacity = HBM_SHARE * chip.hbm_bytes / chip.devices if chip else None
    specs.check_capacity(step, capacity)
    result = _compile(config, step, mesh, name)

    text = result.compiled.as_text()
    if hlo_file:
        pathlib.Path(hlo_file).write_text(text, encoding="utf-8")
    program = hlo.Program(text)
    # A program for several TPU slices numbers the devices of each slice from 0.
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    found = collectives.find(program, len(devices) // slices, slices)
    devices_per_chip = chip.devices if chip else 1
    num_chips = len(devices) // devices_per_chip
    minimum = flops.minimum(setup.model, setup.row, config.global_batch_size)
    networks = _networks(found, mesh, chip)
    bounds = _bound_seconds(result.flops, program, networks, mesh, chip) if chip else {}
    bound = max(bounds.values(), default=None)
    mfu = sum(minimum.values()) / (bound * num_chips * chip.peak_flops) if chip else None
    hours = config.global_batch_size * config.data.row.windows * setup.model.window.seconds / 3600
    return {
        "topology": name,
        "chips": num_chips,
        "mesh": dict(mesh.shape),
        "rows_per_chip": config.global_batch_size / num_chips,
        "remat": str(config.model.remat),
        "window_batch": config.model.window_batch,
        **_memory(step, result.compiled.memory_analysis(), devices, chip),
        "flops_executed": result.flops,
        "flops_minimum": sum(minimum.values()),
        "flops_minimum_by_term": minimum,
        **_collectives(found, devices_per_chip),
        "networks": networks,
        "largest_layer_gib": _largest_layer(step) / GIB,
        "embedding_gib": _embedding(step) / GIB,
        "bound_seconds": bounds or None,
        "binds": max(bounds, key=bounds.get, default=None),
        "mfu_bound": mfu,
        "traffic": _largest_traffic(program),
        "audio_hours_per_step": hours,
        "audio_hours_per_day": hours * 86_400 / bound if chip else None,
        "effort": jax.config.jax_optimization_level.replace("UNKNOWN", "default"),
        "trace_seconds": result.trace_seconds,
        "compile_seconds": result.compile_seconds,
    }


def _compile(config: ConfigDict, step: StepSpecs, mesh: Mesh, name: str) -> CompiledStep:
    shape, rows = tuple(mesh.shape.values()), config.global_batch_size
    with progress(f"tracing and compiling for {name}, mesh {shape}, {rows} rows"):
        start = time.monotonic()
        traced = step.jit().trace(step.state, step.frozen, step.batch)
        executed = flops.executed(traced)
        lowered = traced.lower()
        compile_start = time.monotonic()
        try:
            compiled = lowered.compile(compiler_options=_options(mesh))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error):
                raise
            raise memory.CapacityError(
                f"{name}, mesh {dict(mesh.shape)}: {_reason(error)}; {memory_advice(config)}"
            ) from None
        end = time.monotonic()
    return CompiledStep(compiled, executed, compile_start - start, end - compile_start)


def _options(mesh: Mesh) -> dict[str, bool]:
    """Compiler options for devices that do not exist."""
    is_absent = mesh.devices.flat[0] not in jax.local_devices()
    return compiler.NO_GPU if mesh.devices.flat[0].platform == "gpu" and is_absent else {}


def _reason(error: Exception) -> str:
    """The compiler's sentence about memory, without the list of allocations."""
    text = " ".join(str(error).split())
    start = max(0, text.find("Ran out of memory"))
    return text[start : start + 200].split(". Exceeded")[0].rstrip(".")


def memory_advice(config: ConfigDict) -> str:
    """What to change if a step does not fit in memory."""
    return (
        f"use fewer rows per chip, increase config.mesh.fsdp={config.mesh.fsdp}, decrease "
        f"config.model.window_batch={config.model.window_batch}, or save fewer activations than "
        f"config.model.remat={config.model.remat}"
    )


def _memory(
    step: StepSpecs,
    analysis: MemoryAnalysis,
    devices: list[jax.Device],
    chip: chips.Chip | None,
) -> dict:
    """JSON fields about the memory of one chip."""
    devices_per_chip = chip.devices if chip else 1
    kinds = memory.step_bytes(step.frozen, step.state.trained, step.state.opt_state, step.batch)
    kinds["arguments"] = analysis.argument_size_in_bytes
    kinds["temporaries"] = analysis.temp_size_in_bytes
    # The peak that XLA reports on CPU leaves out the temporaries.
    has_peak = analysis.peak_memory_in_bytes and devices[0].platform != "cpu"
    peak = devices_per_chip * (analysis.peak_memory_in_bytes if has_peak else total_bytes(analysis))
    return {
        "fits": peak <= HBM_SHARE * chip.hbm_bytes if chip else None,
        "hbm_peak_gib": peak / GIB,
        "hbm_capacity_gib": chip.hbm_bytes / GIB if chip else None,
        "hbm_gib": {kind: devices_per_chip * size / GIB for kind, size in kinds.items()},
    }


def total_bytes(analysis: MemoryAnalysis) -> int:
    """Bytes per device of arguments, outputs and temporaries; donated buffers count once."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def _collectives(found: list[collectives.Collective], devices_per_chip: int) -> dict:
    """JSON fields about the bytes that one chip sends per step."""
    by_kind = {
        kind: devices_per_chip * sum(c.bytes_per_step for c in found if c.kind == kind) / GIB
        for kind in collectives.KINDS
    }
    gathers = sorted((c for c in found if c.kind == "all-gather"), key=lambda c: -c.result_bytes)
    return {
        "collective_gib": devices_per_chip * sum(c.bytes_per_step for c in found) / GIB,
        "collective_gib_by_kind": by_kind,
        "largest_gather_gib": gathers[0].result_bytes / GIB if gathers else 0.0,
        "gathers": [
            {"gib": c.result_bytes / GIB, "runs": c.count, "origin": c.origin} for c in gathers[:5]
        ],
    }


def _largest_traffic(program: hlo.Program) -> list[dict]:
    """JSON objects of the ten instructions that move the most bytes of HBM."""
    return [
        {
            "name": entry.instruction.name,
            "source": program.source(entry.instruction),
            "gib": entry.bytes_moved / GIB,
            "runs": entry.count,
        }
        for entry in traffic.by_instruction(program)[:10]
    ]


def _largest_layer(step: StepSpecs) -> int:
    """Bytes of the frozen weights of one layer, in the tower with the larger layers."""
    layers = {"encoder/layers/": 0, "llm/layers/": 0}
    for path, leaf in step.frozen.items():
        for prefix in layers:
            if path.startswith(prefix):
                layers[prefix] += leaf.size * leaf.dtype.itemsize // leaf.shape[0]
    return max(layers.values())


def _embedding(step: StepSpecs) -> int:
    """Bytes of the token embedding."""
    leaf = step.params["llm/embed_tokens"]
    return leaf.size * leaf.dtype.itemsize


def _networks(
    found: list[collectives.Collective], mesh: Mesh, chip: chips.Chip | None
) -> dict[str, dict[str, float | None]]:
    """What a chip sends within a slice or node ("ici") and between them ("dcn"), and how long."""
    devices = mesh.devices.ravel().tolist()
    result = {}
    for network in ("ici", "dcn"):
        sent = sum(collectives.bytes_by_network(c, devices)[network] for c in found)
        times = [collectives.seconds(c, devices, chip)[network] for c in found if chip]
        seconds = sum(times) if chip else None
        scale = chip.devices if chip else 1
        result[network] = {"gib": scale * sent / GIB, "seconds": seconds}
    return result


def _bound_seconds(
    executed: int,
    program: hlo.Program,
    networks: dict[str, dict[str, float | None]],
    mesh: Mesh,
    chip: chips.Chip,
) -> dict[str, float]:
    """Lower bounds on the step time from the chip's peak figures, without any overlap."""
    num_chips = mesh.size // chip.devices
    return {
        "compute": executed / (num_chips * chip.peak_flops),
        "memory": chip.devices * traffic.hbm_traffic(program) / chip.hbm_bandwidth,
        "interconnect": sum(network["seconds"] for network in networks.values()),
    }
