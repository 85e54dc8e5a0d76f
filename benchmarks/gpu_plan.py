"""Plans the three full-size stages for nodes of GPUs and writes docs/gpu_plan.md.

    python benchmarks/gpu_plan.py [--stages=stage1_shortform,…] [--topologies=h100:8,…] [--render]

Each plan runs `python -m fastslm_jax.plan` in a separate process. XLA's GPU compiler runs on any
machine (pip install -e .[plan-gpu]) and takes several GiB of memory and minutes of one core per
plan. Results are kept in docs/gpu_plan.jsonl; existing ones are skipped, so that an interrupted run
resumes; --render only writes the page. Last line: one JSON object.

Targets: every plan fits in 85 % of a card's memory; executed operations are at most 1.20 times the
minimum; no gather is larger than a layer's frozen weights or the embedding; collectives within a
node take less than 20 % of the time of the matrix products; the MFU bound of stage 2 on H100 is at
least 75 %.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import plan_pages
from absl import app
from banner import print_banner

from fastslm_jax import chips

TOPOLOGIES = ("h100:1", "h100:8", "h100:8x4", "h100:8x32", "a100-80:8", "h200:8", "b200:8")


def overrides(topology: str) -> tuple[str, ...]:
    """The mesh and rematerialization for cards of 80 GB and more.

    Weights are sharded within a node and replicated over nodes, so that only gradients cross the
    network. Only cheap activations are computed again.
    """
    return (
        "--config.mesh.data=-1",
        f"--config.mesh.fsdp={chips.parse_topology(topology).gpus}",
        "--config.model.remat=attention,query,key,value,out,gate,up",
    )


INTRODUCTION = """\
# Plans for nodes of GPUs

Written by `python benchmarks/gpu_plan.py` from docs/gpu_plan.jsonl. XLA's GPU compiler compiled
each of these steps for all cards; none of them ran. Steps marked "not run" have not been
compiled. h100:8x4 is four nodes of eight cards. Times are bounds (docs/performance.md): what the
cards' peak rates allow, with no transfer hidden behind matrix products. Rows are full: in stages 2
and 3 a row is one 15-minute recording, in stage 1 eight windows of 30 s. A B200 has memory for
twice the rows of the others, and with the others' rows it waits for the weights (NVLink takes 20 %
of the compute bound in stages 2 and 3, 22 % in stage 1).

Targets: memory (85 % of the card), operations (executed / minimum at most 1.20), gathers (none
larger than a layer's frozen weights, except the embedding's), collectives (NVLink less than 20 % of
the compute bound), MFU (the bound of stage 2 on H100 at least 75 %). Compile times are wall-clock
times on two shared cores.

What a compilation without a GPU does not know:

- Autotuning: which cuBLAS algorithm or Triton tile is fastest, and the workspace it takes. The
  planner turns Triton matrix products off (`fastslm_jax/compiler.py` says why).
- How fast the kernels are. cuDNN's attention and Pallas' are counted by formula: matrix products
  (`fastslm_jax/flops.py`), and their operands and results as HBM traffic. The workspace of cuDNN's
  backward pass is not counted.
- Which collectives overlap with which products, and NCCL's buffers.
"""

CLOSING = """
## Meshes

| cards | mesh | why |
|---|---|---|
| 1 × 80 GB | `--config.mesh.data=1 --config.mesh.fsdp=1` | all weights on one card |
| 8 × 80 GB, one node | `--config.mesh.data=-1 --config.mesh.fsdp=8` | NVLink carries the weights |
| several nodes of eight | same | only gradients cross the network |
| 1 × 24 GB (L4) | one, `librispeech_finetune.py:large,4b,24` | 14.4 of 22.5 GiB; two rows: 18.7 |

With `--config.model.remat=attention,query,key,value,out,gate,up`: the configs' own values are for
TPUs of 16 GB. The row of 24 GB: `python -m fastslm_jax.plan
--config=configs/librispeech_finetune.py:large,4b,24 --topology=l4:1` (docs/quickstart_gpu.md). One
15-minute row of stage 2 takes 12.6 GiB, compiled for an H100 (`--topology=h100:1 --rows_per_chip=1
--config.mesh.data=1 --config.mesh.fsdp=1 --config.model.remat=full --config.model.window_batch=5`).
`fastslm_jax/compiler.py` has the compiler options of a train step on several GPUs. What has run on
a card is in [gpu_measured.md](gpu_measured.md).
"""

plan_pages.define_flags(TOPOLOGIES)


def misses(r: dict) -> list[str]:
    """Names of the targets that a plan does not meet."""
    compute = r["bound_seconds"]["compute"]
    is_h100_stage2 = r["stage"] == "stage2_longform" and r["topology"].startswith("h100:")
    checks = {
        "memory": not r["fits"],
        "operations": r["flops_executed"] > 1.20 * r["flops_minimum"],
        "gathers": plan_pages.large_gathers(r),
        "collectives": r["networks"]["ici"]["seconds"] >= 0.2 * compute,
        "MFU": is_h100_stage2 and r["mfu_bound"] < 0.75,
    }
    return [name for name, missed in checks.items() if missed]


PAGE = plan_pages.Page(
    name="gpu_plan",
    introduction=INTRODUCTION,
    topologies=TOPOLOGIES,
    overrides=overrides,
    misses=misses,
    closing=CLOSING,
    more_rows={"b200:8": 2},
)


def main(_: list[str]) -> None:
    print_banner("Plans of the full-size stages against their targets, by XLA's compiler.", "cpu")
    PAGE.make()


if __name__ == "__main__":
    app.run(main)
