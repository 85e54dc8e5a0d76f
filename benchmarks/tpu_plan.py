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

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import plan_pages
from absl import app
from banner import print_banner

TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5e:16x16x2", "v5p:4x4x4", "v5p:8x8x16", "v6e:16x16")
# Each chip keeps as many activations as fit, which saves operations and traffic. Chips with more
# memory than v5e replicate the frozen weights (no gathers).
MOST = "attention,query,key,value,out,gate"
WHOLE = ("--config.mesh.fsdp=1", f"--config.model.remat={MOST},up")
OVERRIDES = {"v5e": (f"--config.model.remat={MOST}",), "v5p": WHOLE, "v6e": WHOLE}
LARGEST_RATIO = {"v5e": 1.20, "v5p": 1.10}

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

plan_pages.define_flags(TOPOLOGIES)


def misses(r: dict) -> list[str]:
    """Names of the targets that a plan does not meet."""
    chip = r["topology"].partition(":")[0]
    bounds, ratio = r["bound_seconds"], r["flops_executed"] / r["flops_minimum"]
    checks = {
        "memory": not r["fits"],
        "operations": ratio > LARGEST_RATIO.get(chip, float("inf")),
        "gathers": plan_pages.large_gathers(r),
        "collectives": chip == "v5p" and bounds["interconnect"] >= 0.2 * bounds["compute"],
    }
    return [name for name, missed in checks.items() if missed]


PAGE = plan_pages.Page(
    name="tpu_plan",
    introduction=INTRODUCTION,
    topologies=TOPOLOGIES,
    overrides=lambda topology: OVERRIDES[topology.partition(":")[0]],
    misses=misses,
)


def main(_: list[str]) -> None:
    print_banner("Plans of the full-size stages against their targets, by the TPU compiler.", "cpu")
    PAGE.make()


if __name__ == "__main__":
    app.run(main)
