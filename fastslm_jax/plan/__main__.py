"""Compiles the train step of a config and reports whether it fits and what limits its speed.

    python -m fastslm_jax.plan --config=configs/stage2_longform.py --topology=v5e:4x4
    python -m fastslm_jax.plan --config=... --topology=v5e:16x16x2 --rows_per_chip=1    # two slices
    python -m fastslm_jax.plan --config=... --topology=h100:8x4 --config.mesh.fsdp=8  # four nodes
    python -m fastslm_jax.plan --config=... --config.mesh.fsdp=1                 # local devices
    python -m fastslm_jax.plan --config=... --topology=v5p:4x4x4 --sweep

For TPU topologies, the TPU compiler (pip install -e .[tpu]) compiles the step on any machine, with
or without a TPU, and for nodes of GPUs XLA's GPU compiler (pip install -e .[plan-gpu]). Times are
lower bounds from the peak figures of the chips: real steps take longer.
--sweep ranks meshes and rows per chip. --effort=O0 compiles several times faster and slightly
overestimates (docs/performance.md). --traffic lists the instructions that move most bytes.

The last line of the output is a JSON object.
"""

from absl import flags
from ml_collections import config_flags

from fastslm_jax import cli

FLAGS = flags.FLAGS
WITHOUT_A_GPU = (
    "Compiled without a GPU. Not known: autotuned algorithms, tiles and their workspaces; how fast "
    "the kernels are; what overlaps; NCCL's buffers."
)


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Config file, for example configs/stage2_longform.py.", lock_config=True
    )
    flags.DEFINE_string(
        "topology",
        "",
        "TPU topology: v5e:4x4, v5p:8x8x16, v6e:16x16, v5e:16x16x2 (two slices), …; or GPUs of a "
        "node, and nodes: l4:1, a100-80:8, h100:8, h100:8x32, h200:8, b200:8, gb200:72, …; "
        "default: the local devices.",
    )
    flags.DEFINE_integer(
        "rows_per_chip",
        0,
        "Sets config.global_batch_size to this many rows per chip; 0: unchanged.",
    )
    flags.DEFINE_bool("sweep", False, "Plan several meshes and rows per chip, and rank them.")
    flags.DEFINE_list("sweep_rows", ["1", "2", "4"], "Rows per chip of the sweep.")
    flags.DEFINE_list(
        "sweep_fsdp", [], "Sizes of the fsdp axis of the sweep; default: powers of two."
    )
    flags.DEFINE_list("sweep_tensor", ["1"], "Sizes of the tensor axis of the sweep.")
    flags.DEFINE_enum(
        "effort",
        "default",
        ["default", "O0", "O1", "O2", "O3"],
        "Optimization level of the compiler.",
    )
    flags.DEFINE_bool(
        "traffic", False, "List the ten instructions that move the most bytes of HBM, per run."
    )
    flags.DEFINE_string("hlo", "", "File to write the optimized HLO to.")
    flags.mark_flag_as_required("config")


if __name__ == "__main__":
    define_flags()
    cli.parse_flags()  # before the imports below, which take seconds

import json
import pathlib
import tempfile
from collections.abc import Sequence

import jax

from fastslm_jax import chips, outputs
from fastslm_jax import config as config_lib
from fastslm_jax.plan import published_configs
from fastslm_jax.plan.compile import plan, set_rows
from fastslm_jax.plan.sweep import sweep
from fastslm_jax.plan.table import print_table, print_traffic


def main(_: Sequence[str]) -> None:
    config = FLAGS.config
    config_lib.check(config)
    if FLAGS.hlo:
        outputs.check_file(FLAGS.hlo, "--hlo")
    jax.config.update("jax_enable_compilation_cache", False)  # so that compile_seconds is correct
    if FLAGS.effort != "default":
        jax.config.update("jax_optimization_level", FLAGS.effort)
    topology = None
    if FLAGS.topology:
        jax.config.update("jax_platforms", "cpu")
        topology = chips.parse_topology(FLAGS.topology)
        devices, chip, name = topology.devices(), topology.chip, FLAGS.topology
    else:
        devices = jax.devices()
        chip = chips.of_device(devices[0])
        name = f"{len(devices)} × {devices[0].device_kind}"
    with tempfile.TemporaryDirectory() as folder:
        for base in ("whisper", "llm"):
            config.base[base] = published_configs.local(config.base[base], pathlib.Path(folder))
        if FLAGS.sweep:
            sizes = (FLAGS.sweep_rows, FLAGS.sweep_fsdp, FLAGS.sweep_tensor)
            result = sweep(config, devices, chip, name, *(list(map(int, part)) for part in sizes))
        else:
            set_rows(config, devices, chip, FLAGS.rows_per_chip)
            result = plan(config, devices, chip, name, FLAGS.hlo)
            print_table(result)
            if isinstance(topology, chips.GPUTopology):
                print(WITHOUT_A_GPU)
            if FLAGS.traffic:
                print_traffic(result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
