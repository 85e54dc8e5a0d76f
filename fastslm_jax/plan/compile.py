"""Compiles the train step of a config for chips that need not be there, and says whether it fits and what binds it.

    python -m fastslm_jax.plan --config=configs/stage2_longform.py --topology=v5e:4x4 [--rows_per_chip=1] [--config.a.b=v]
    python -m fastslm_jax.plan --config=configs/stage2_longform.py --topology=v5e:16x16x2 --rows_per_chip=1        two slices
    python -m fastslm_jax.plan --config=configs/stage2_longform.py --config.mesh.fsdp=1           the devices at hand
    python -m fastslm_jax.plan --config=configs/stage2_longform.py --topology=v5p:4x4x4 --sweep

The step is the one that train.py runs, by shapes alone: no weights are read and no data. The TPU compiler itself compiles for
TPUs (pip install -e .[tpu]), on any machine. Bounds are the least times that the chips' peak figures allow: real steps take
longer. --sweep tries meshes and rows per chip and ranks those that fit. --effort=O0 compiles several times faster: how arrays
lie and what is sent stays, the code of each operation is worse (docs/performance.md). The last line is a JSON object.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from fastslm_jax import chips, flops, memory, sharding
from fastslm_jax.errors import UserError
from fastslm_jax.plan import collectives, hlo, published_configs
from fastslm_jax.training import experiment, specs

FLAGS = flags.FLAGS
HBM_SHARE = 0.85  # of a chip's memory that a plan may take: the rest is for the runtime, for fragments and for evaluation
GIB = chips.GIB


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "The experiment, for example configs/stage2_longform.py.", lock_config=True
    )
    flags.DEFINE_string(
        "topology",
        "",
        "v5e:4x4, v5p:8x8x16, v6e:16x16, v5e:16x16x2 (two slices), …; by default the devices here.",
    )
    flags.DEFINE_integer(
        "rows_per_chip",
        0,
        "Sets config.global_batch_size to so many rows for each chip; 0 leaves it.",
    )
    flags.DEFINE_bool("sweep", False, "Tries meshes and rows per chip, and ranks those that fit.")
    flags.DEFINE_list("sweep_rows", ["1", "2", "4"], "Rows per chip that a sweep tries.")
    flags.DEFINE_list(
        "sweep_fsdp", [], "Sizes of the fsdp axis that a sweep tries; by default powers of two."
    )
    flags.DEFINE_list("sweep_tensor", ["1"], "Sizes of the tensor axis that a sweep tries.")
    flags.DEFINE_enum(
        "effort", "default", ["default", "O0", "O1", "O2", "O3"], "How hard the compiler tries."
    )
    flags.DEFINE_string("hlo", "", "A file to which the compiled program is written.")
    flags.mark_flag_as_required("config")


def main(_) -> None:
    config = FLAGS.config
    jax.config.update("jax_enable_compilation_cache", False)  # compile_seconds are to be true
    if FLAGS.effort != "default":
        jax.config.update("jax_optimization_level", FLAGS.effort)
    if FLAGS.topology:
        jax.config.update("jax_platforms", "cpu")
        topology = chips.parse_topology(FLAGS.topology)
        devices, chip = topology.devices(), topology.chip
    else:
        devices = jax.devices()
        chip = chips.of_device(devices[0])
    name = FLAGS.topology or f"{len(devices)} × {devices[0].device_kind}"
    with tempfile.TemporaryDirectory() as folder:
        for base in ("whisper", "llm"):
            config.base[base] = published_configs.local(config.base[base], pathlib.Path(folder))
        if FLAGS.sweep:
            tried = (FLAGS.sweep_rows, FLAGS.sweep_fsdp, FLAGS.sweep_tensor)
            result = sweep(
                config, devices, chip, name, *([int(size) for size in sizes] for sizes in tried)
            )
        else:
            set_rows(config, devices, chip, FLAGS.rows_per_chip)
            result = plan(config, devices, chip, name, FLAGS.hlo)
            print_table(result)
    print(json.dumps(result))


def set_rows(
    config: ConfigDict, devices: list, chip: chips.Chip | None, rows_per_chip: int
) -> None:
    if rows_per_chip:
        config.global_batch_size = (
            rows_per_chip * config.accumulate * len(devices) // (chip.devices if chip else 1)
        )


# ------------------------------------------------------------------------------------------------------------------ plan


def plan(
    config: ConfigDict, devices: list, chip: chips.Chip | None, name: str, hlo_file: str = ""
) -> dict:
    """Compiles the step of a config for devices. Returns what main prints; a figure that cannot be known is None.

    hlo_file takes the compiled program's text.

    Raises:
        UserError: shapes that do not divide, a mesh that is not the devices', or a step that a chip cannot hold.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    setup = experiment.build(config, weights=False, mesh=mesh)
    step = specs.build(setup, mesh)
    kinds = memory.step_bytes(step.frozen, step.state.trained, step.state.opt_state, step.batch)
    usable = HBM_SHARE * chip.hbm_bytes / chip.devices if chip else None
    specs.check_capacity(step, usable)

    with _progress(
        f"tracing and compiling for {name}, mesh {tuple(mesh.shape.values())}, {config.global_batch_size} rows"
    ):
        begin = time.monotonic()
        train_step = jax.jit(
            step.train_step,
            in_shardings=step.in_shardings,
            out_shardings=step.out_shardings,
            donate_argnums=0,
        )
        traced = train_step.trace(step.state, step.frozen, step.batch)
        executed = flops.executed(traced)
        lowered = traced.lower()
        compile_begin = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error):
                raise
            raise memory.CapacityError(
                f"{name}, mesh {dict(mesh.shape)}: {_reason(error)}; {_advice(config)}"
            ) from None
        end = time.monotonic()

    analysis = compiled.memory_analysis()
    text = compiled.as_text()
    if hlo_file:
        pathlib.Path(hlo_file).write_text(text)
    program = hlo.Program(text)
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    used = collectives.find(program, len(devices) // slices, slices)
    per_chip = chip.devices if chip else 1
    num_chips = len(devices) // per_chip
    is_known = (
        analysis.peak_memory_in_bytes and devices[0].platform != "cpu"
    )  # on CPU it leaves the temporaries out
    peak = per_chip * (analysis.peak_memory_in_bytes if is_known else total_bytes(analysis))
    capacity = chip.hbm_bytes if chip else None
    minimum = flops.minimum(setup.model, setup.row, config.global_batch_size)
    bounds = find_bounds(executed, program, used, mesh, chip, num_chips)
    longest = max(bounds.values()) if chip else None
    hours = config.global_batch_size * config.data.row.windows * setup.model.window.seconds / 3600
    gathers = sorted((c for c in used if c.kind == "all-gather"), key=lambda c: -c.result)[:5]
    return {
        "topology": name,
        "chips": num_chips,
        "mesh": dict(mesh.shape),
        "rows_per_chip": config.global_batch_size / num_chips,
        "remat": str(config.model.remat),
        "window_batch": config.model.window_batch,
        "fits": peak <= HBM_SHARE * capacity if chip else None,
        "hbm_peak_gib": peak / GIB,
        "hbm_capacity_gib": capacity / GIB if chip else None,
        "hbm_gib": {kind: per_chip * size / GIB for kind, size in kinds.items()}
        | {
            "arguments": per_chip * analysis.argument_size_in_bytes / GIB,
            "temporaries": per_chip * analysis.temp_size_in_bytes / GIB,
        },
        "flops_executed": executed,
        "flops_minimum": sum(minimum.values()),
        "flops_minimum_by_term": minimum,
        "collective_gib": per_chip * sum(c.runs * c.sent for c in used) / GIB,
        "collective_gib_by_kind": {
            kind: per_chip * sum(c.runs * c.sent for c in used if c.kind == kind) / GIB
            for kind in collectives.KINDS
        },
        "largest_gather_gib": gathers[0].result / GIB if gathers else 0.0,
        "gathers": [{"gib": c.result / GIB, "runs": c.runs, "origin": c.origin} for c in gathers],
        "largest_layer_gib": largest_layer(step) / GIB,
        "embedding_gib": embedding(step) / GIB,
        "bound_seconds": bounds if chip else None,
        "binds": max(bounds, key=bounds.get) if chip else None,
        "mfu_bound": sum(minimum.values()) / (longest * num_chips * chip.peak_flops)
        if chip
        else None,
        "audio_hours_per_step": hours,
        "audio_hours_per_day": hours * 86_400 / longest if chip else None,
        "effort": jax.config.jax_optimization_level.replace("UNKNOWN", "default"),
        "trace_seconds": compile_begin - begin,
        "compile_seconds": end - compile_begin,
    }


def find_bounds(
    executed, program, used, mesh: Mesh, chip: chips.Chip | None, num_chips: int
) -> dict[str, float] | None:
    """Seconds that the step takes at least: by matrix products, by memory traffic, and by what is sent (none of it hidden)."""
    if chip is None:
        return None
    devices = mesh.devices.ravel().tolist()
    sent = [collectives.seconds(c, devices, chip) for c in used]
    return {
        "compute": executed / (num_chips * chip.peak_flops),
        "memory": chip.devices * hlo.traffic(program) / chip.hbm_bandwidth,
        "interconnect": sum(part["ici"] + part["dcn"] for part in sent),
    }


def total_bytes(analysis) -> float:
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def largest_layer(step: specs.StepSpecs) -> int:
    """Bytes of the frozen weights of one layer of the larger tower."""
    layers = {"encoder/layers/": 0, "llm/layers/": 0}
    for path, leaf in step.frozen.items():
        for prefix in layers:
            if path.startswith(prefix):
                layers[prefix] += leaf.size * leaf.dtype.itemsize // leaf.shape[0]
    return max(layers.values())


def embedding(step: specs.StepSpecs) -> int:
    leaf = step.params["llm/embed_tokens"]
    return leaf.size * leaf.dtype.itemsize


def mesh_sizes(config: ConfigDict, devices: list) -> list[int]:
    """Sizes of the fsdp axis that the devices allow."""
    free = len(devices) // config.mesh.tensor
    return [size for size in (2**power for power in range(20)) if free % size == 0 and size <= free]


def _reason(error: Exception) -> str:
    """The compiler's sentence about memory, without what it lists after it."""
    text = " ".join(str(error).split())
    start = max(0, text.find("Ran out of memory"))
    return text[start : start + 200].split(". Exceeded")[0].rstrip(".")


def _advice(config: ConfigDict) -> str:
    return (
        f"take fewer rows per chip, a larger config.mesh.fsdp than {config.mesh.fsdp}, a smaller config.model.window_batch, "
        f"or keep less than config.model.remat={config.model.remat}"
    )


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep(
    config: ConfigDict, devices: list, chip: chips.Chip | None, name: str, rows: list[int], fsdp: list[int] | None = None,
    tensor: Sequence[int] = (1,),
) -> dict:  # fmt: skip
    """Plans for several sizes of the axes fsdp (default: powers of two) and tensor, and several rows per chip. Returns the best
    with `ranked`, all that fit, by audio hours a day.

    Raises:
        memory.CapacityError: nothing fits.
    """
    results, meshes = [], []
    for columns in tensor:
        config.mesh.tensor = columns
        meshes += [(size, columns) for size in fsdp or mesh_sizes(config, devices)]
    for shards, columns in meshes:
        for rows_per_chip in rows:
            config.mesh.update({"data": -1, "fsdp": shards, "tensor": columns})
            set_rows(config, devices, chip, rows_per_chip)
            label = f"fsdp {shards}, tensor {columns}, {rows_per_chip} rows a chip"
            try:
                result = plan(config, devices, chip, name)
            except UserError as error:
                print(f"{label}: {error}", flush=True)
                if isinstance(error, memory.CapacityError):
                    break  # more rows hold more
                continue
            results.append(result)
            verdict = "fits" if result["fits"] else "does not fit" if chip else "compiles"
            print(f"{label}: {verdict}, {result['hbm_peak_gib']:.2f} GiB", flush=True)
    fitting = [result for result in results if result["fits"] is not False]
    if not fitting:
        tried = ", ".join(f"{shards} × {columns}" for shards, columns in meshes)
        raise memory.CapacityError(
            f"{name}: none of fsdp × tensor {tried} with {rows} rows a chip fits; {_advice(config)}"
        )
    fitting.sort(key=lambda result: -(result["audio_hours_per_day"] or 0))
    heads = {
        "fsdp": 5,
        "tensor": 6,
        "rows/chip": 9,
        "GiB": 7,
        "executed/minimum": 17,
        "binds": 13,
        "MFU bound": 10,
        "audio h/day": 12,
    }
    print("\n" + " ".join(f"{head:>{width}}" for head, width in heads.items()))
    for r in fitting:
        binds, mfu, day = (
            (r["binds"], f"{r['mfu_bound']:.1%}", f"{r['audio_hours_per_day']:,.0f}")
            if chip
            else ("-", "-", "-")
        )
        print(
            f"{r['mesh']['fsdp']:>5} {r['mesh']['tensor']:>6} {r['rows_per_chip']:>9g} {r['hbm_peak_gib']:>7.2f} "
            f"{r['flops_executed'] / r['flops_minimum']:>17.3f} {binds:>13} {mfu:>10} {day:>12}"
        )
    ranked = [
        {
            key: r[key]
            for key in ("mesh", "rows_per_chip", "hbm_peak_gib", "mfu_bound", "audio_hours_per_day")
        }
        for r in fitting
    ]
    return {**fitting[0], "ranked": ranked}


# --------------------------------------------------------------------------------------------------------------- printing


def print_table(r: dict) -> None:
    def show(label, value):
        print(f"{label:<34} {value}")

    bounds = r["bound_seconds"]
    show("topology", f"{r['topology']} ({r['chips']} chips)")
    show("mesh", " × ".join(f"{axis} {size}" for axis, size in r["mesh"].items()))
    show("rows per chip", f"{r['rows_per_chip']:g}")
    show("memory of a chip", "GiB")
    for kind, size in r["hbm_gib"].items():
        show(f"  {kind}", f"{size:.2f}")
    verdict = (
        ""
        if bounds is None
        else f" of {r['hbm_capacity_gib']:.0f}: " + ("fits" if r["fits"] else "does not fit")
    )
    show(
        "  peak", f"{r['hbm_peak_gib']:.2f}{verdict}" + (f" in {HBM_SHARE:.0%}" if verdict else "")
    )
    show("FLOPs executed", f"{r['flops_executed']:.4g}")
    show(
        "  least that the model needs",
        f"{r['flops_minimum']:.4g} (ratio {r['flops_executed'] / r['flops_minimum']:.3f})",
    )
    show("sent by a chip, GiB", f"{r['collective_gib']:.2f}")
    for kind, size in r["collective_gib_by_kind"].items():
        if size:
            show(f"  {kind}", f"{size:.3f}")
    limit = f"a layer has {r['largest_layer_gib']:.3f}, the embedding {r['embedding_gib']:.3f}"
    show("largest gather, GiB", f"{r['largest_gather_gib']:.3f} ({limit})")
    if bounds:
        for kind, seconds in bounds.items():
            show(
                f"bound by {kind}, s", f"{seconds:.4f}" + (" ← binds" if kind == r["binds"] else "")
            )
        show("MFU at most", f"{r['mfu_bound']:.1%}")
    else:
        show("bounds", "not known: chips.py has no figures of this device")
    show("audio hours per step", f"{r['audio_hours_per_step']:.2f}")
    if bounds:
        show("audio hours per day at most", f"{r['audio_hours_per_day']:,.0f}")
    show("tracing and compiling, s", f"{r['trace_seconds']:.1f} + {r['compile_seconds']:.1f}")


@contextlib.contextmanager
def _progress(text: str, every: float = 5.0):
    """A line on stderr while the block runs: rewritten on a terminal, else written once."""
    stop, is_terminal, begin = threading.Event(), sys.stderr.isatty(), time.monotonic()

    def show():
        while not stop.wait(every):
            print(
                f"\r{text}: {time.monotonic() - begin:.0f} s", end="", file=sys.stderr, flush=True
            )

    if not is_terminal:
        print(text, file=sys.stderr, flush=True)
        yield
        return
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        print("\r" + " " * (len(text) + 12) + "\r", end="", file=sys.stderr, flush=True)
