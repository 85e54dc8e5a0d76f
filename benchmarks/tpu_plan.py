"""Plans the three full-size stages for TPU slices and writes docs/tpu_plan.md.

    python benchmarks/tpu_plan.py [--stages=stage1_shortform,…] [--topologies=v5e:4x4,…]
        [--effort=O0] [--render]

Each plan runs `python -m fastslm_jax.plan` in a separate process. The TPU compiler runs on any
machine (pip install -e .[tpu]) and takes several GiB of memory and minutes of one core per plan.
Results are kept in docs/tpu_plan.jsonl, and existing ones are skipped, whatever their --effort;
--render only writes the page. Last line: one JSON object.

Targets: every plan fits in 85 % of a chip's memory with at least one row per chip; executed
operations are at most 1.20 times the minimum on v5e and 1.10 times on v5p; no gather is larger than
a layer's frozen weights or the embedding; on v5p, collectives take less than 20 % of the time of
the matrix products.
"""

import json
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import app, flags
from banner import print_banner

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs/tpu_plan.jsonl", ROOT / "docs/tpu_plan.md"
STAGES = ("stage1_shortform", "stage2_longform", "stage3_instruct")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5e:16x16x2", "v5p:4x4x4", "v5p:8x8x16", "v6e:16x16")
# Chips with more memory replicate the frozen weights (no gathers); v5p also rematerializes less.
# The configs' own values are for v5e.
EVERYTHING = "attention,query,key,value,out,gate,up"
OVERRIDES = {
    "v5e": (),
    "v5p": ("--config.mesh.fsdp=1", f"--config.model.remat={EVERYTHING}"),
    "v6e": ("--config.mesh.fsdp=1",),
}
ROWS_PER_CHIP = {"stage1_shortform": 4, "stage2_longform": 1, "stage3_instruct": 1}
LARGEST_RATIO = {"v5e": 1.20, "v5p": 1.10}

COLUMNS = (
    "config",
    "slice",
    "data × fsdp × tensor",
    "rows per chip",
    "peak, GiB",
    "executed / minimum",
    "sent per chip, GiB",
    "largest gather, GiB",
    "compute / memory / interconnect, s",
    "MFU bound",
    "audio hours per day, bound",
    "effort",
    "compile, s",
    "targets",
)

INTRODUCTION = """\
# Plans for TPU slices

Written by `python benchmarks/tpu_plan.py` from docs/tpu_plan.jsonl. The TPU compiler compiled each
of these steps for the whole slice; nothing ran on a TPU. Steps marked "not run" have not been
compiled. Times are bounds (docs/performance.md): what the chips' peak rates allow, with no transfer
hidden behind matrix products. Rows are full: in stages 2 and 3 a row is one 15-minute recording.

Targets: memory (85 % of the chip), operations (executed / minimum at most 1.20 on v5e, 1.10 on
v5p), gathers (none larger than a layer's frozen weights, except the embedding's), collectives (on
v5p less than 20 % of the compute bound). Effort is the compiler's optimization effort (`--effort`,
docs/performance.md). Compile times are wall-clock times.
"""

FLAGS = flags.FLAGS
flags.DEFINE_list("stages", list(STAGES), "Names of configs.")
flags.DEFINE_list("topologies", list(TOPOLOGIES), "Slices to plan for.")
flags.DEFINE_enum(
    "effort",
    "default",
    ["default", "O0", "O1", "O2", "O3"],
    "Optimization effort of the compiler (see `plan`).",
)
flags.DEFINE_bool("render", False, "Only write the page from the stored results.")


def command(stage: str, topology: str) -> list[str]:
    overrides = OVERRIDES[topology.partition(":")[0]]
    rows = f"--rows_per_chip={ROWS_PER_CHIP[stage]}"
    return [
        "-m",
        "fastslm_jax.plan",
        f"--config=configs/{stage}.py",
        f"--topology={topology}",
        rows,
        *overrides,
    ]


def run(stage: str, topology: str) -> dict | None:
    """The plan as `fastslm_jax.plan` reports it; None if it failed."""
    print(f"{stage} {topology}: compiling", flush=True)
    arguments = command(stage, topology)
    done = subprocess.run(
        [sys.executable, *arguments, f"--effort={FLAGS.effort}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        return None
    return {"stage": stage, "command": arguments, **json.loads(done.stdout.splitlines()[-1])}


def stored_results() -> dict[tuple[str, str], dict]:
    """{(stage, topology): result} of stored plans whose command has not changed."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    results = {(r["stage"], r["topology"]): r for r in map(json.loads, lines)}
    return {key: r for key, r in results.items() if r["command"] == command(*key)}


def misses(r: dict) -> list[str]:
    """Names of the targets that a plan does not meet."""
    chip = r["topology"].partition(":")[0]
    bounds, ratio = r["bound_seconds"], r["flops_executed"] / r["flops_minimum"]
    checks = {
        "memory": not r["fits"],
        "operations": ratio > LARGEST_RATIO.get(chip, float("inf")),
        "gathers": any(
            gather["gib"] > 1.001 * r["largest_layer_gib"]
            and abs(gather["gib"] / r["embedding_gib"] - 1) > 0.001
            for gather in r["gathers"]
        ),
        "collectives": chip == "v5p" and bounds["interconnect"] >= 0.2 * bounds["compute"],
    }
    return [name for name, missed in checks.items() if missed]


def row(stage: str, topology: str, r: dict | None) -> str:
    if r is None:
        cells = [stage, topology, "not run", *[""] * (len(COLUMNS) - 4)]
    else:
        bounds, mesh = r["bound_seconds"], r["mesh"]
        cells = [
            stage,
            topology,
            f"{mesh['data']} × {mesh['fsdp']} × {mesh['tensor']}",
            f"{r['rows_per_chip']:g}",
            f"{r['hbm_peak_gib']:.2f} ({r['hbm_peak_gib'] / r['hbm_capacity_gib']:.0%})",
            f"{r['flops_executed'] / r['flops_minimum']:.3f}",
            f"{r['collective_gib']:.2f}",
            f"{r['largest_gather_gib']:.3f}",
            f"{bounds['compute']:.3f} / {bounds['memory']:.3f} / {bounds['interconnect']:.3f}",
            f"{r['mfu_bound']:.0%}",
            f"{r['audio_hours_per_day']:,.0f}",
            r["effort"],
            f"{r['compile_seconds']:.0f}",
        ]
    missed = "" if r is None else ", ".join(misses(r)) or "all met"
    return "| " + " | ".join([*cells, missed]) + " |"


def render(results: dict) -> str:
    lines = [
        INTRODUCTION,
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *(
            row(stage, topology, results.get((stage, topology)))
            for stage in STAGES
            for topology in TOPOLOGIES
        ),
        "",
        "The commands:",
        "",
        "```",
        *(
            " ".join(["python", *command(stage, topology)])
            for stage in STAGES
            for topology in TOPOLOGIES
        ),
        "```",
    ]
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    print_banner("Plans of the full-size stages against their targets, by the TPU compiler.", "cpu")
    results = stored_results()
    for topology in FLAGS.topologies:
        for stage in FLAGS.stages:
            if FLAGS.render or (stage, topology) in results:
                continue
            result = run(stage, topology)
            if result is None:
                print(f"{stage} {topology}: failed, see above", flush=True)
                continue
            results[stage, topology] = result
            RESULTS.write_text("".join(json.dumps(r) + "\n" for r in results.values()))
            missed = ", ".join(misses(result)) or "all targets met"
            print(f"{stage} {topology}: {missed}", flush=True)
    page = render(results)
    PAGE.write_text(page)
    print(page)
    missed = {" ".join(key): misses(r) for key, r in results.items() if misses(r)}
    planned = {"planned": len(results), "of": len(STAGES) * len(TOPOLOGIES)}
    print(json.dumps(planned | {"missed": missed}))


if __name__ == "__main__":
    app.run(main)
