"""The command line of the planner."""

import json
import os
import pathlib
import subprocess
import sys

import tiny_experiment

ROOT = pathlib.Path(__file__).parents[2]


def test_the_command_prints_a_table_and_json(tmp_path):
    tiny_experiment.write(tmp_path / "tiny")
    command = [
        *(sys.executable, "-m", "fastslm_jax.plan"),
        f"--config={tmp_path}/tiny/config.py",
        "--rows_per_chip=1",
    ]
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert (result["topology"], result["chips"], result["rows_per_chip"]) == ("4 × cpu", 4, 1)
    assert f"FLOPs executed                     {result['flops_executed']:.4g}" in table
