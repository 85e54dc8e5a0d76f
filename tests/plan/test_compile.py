"""The planner on a tiny model: for TPUs that are not here, for the devices at hand, and its errors."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_experiment

from fastslm_jax import chips, memory
from fastslm_jax import config as config_lib
from fastslm_jax.errors import UserError
from fastslm_jax.plan import compile as plan

ROOT = pathlib.Path(__file__).parents[2]
needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not here"
)

WHISPER = {
    "model_type": "whisper", "d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 256,
    "num_mel_bins": 16, "max_source_positions": 100,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "rope_theta": 1e6,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """Windows of 2 s with 3 tokens; rows of 4 windows and 256 tokens; bases without weights."""
    config = config_lib.full_size()
    for name, sizes in (("whisper", WHISPER), ("llm", QWEN3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes))
        config.base[name] = str(tmp_path / name)
    config.model.update({"stage_tokens": (8,), "compression_size": 3, "detail_recovery_layers": 1})
    config.model.lora.rank = 4
    config.data.row.update({"windows": 4, "tokens": 256, "labels": 128})
    config.loss_chunk = 64
    config.global_batch_size = 8
    config.mesh.update({"data": -1, "fsdp": 2, "tensor": 1})
    return config


def plan_for(config, topology, rows_per_chip=1):
    slice_of = chips.parse_topology(topology)
    devices = slice_of.devices()
    plan.set_rows(config, devices, slice_of.chip, rows_per_chip)
    return plan.plan(config, devices, slice_of.chip, topology)


@needs_tpu_compiler
def test_a_step_compiles_for_a_slice_that_is_not_here(config):
    config.model.remat = "attention,query,key,value,out"
    result = plan_for(config, "v5e:2x2")
    assert (result["topology"], result["chips"], result["mesh"]) == (
        "v5e:2x2",
        4,
        {"data": 2, "fsdp": 2, "tensor": 1},
    )
    assert result["fits"]
    assert result["hbm_capacity_gib"] == 16
    parts = result["hbm_gib"]
    assert (
        parts["frozen"] + parts["trained"] + parts["optimiser"] + parts["batch"]
        <= parts["arguments"]
        <= result["hbm_peak_gib"]
    )
    assert (
        1.0 < result["flops_executed"] / result["flops_minimum"] < 4
    )  # short rows: kernels work in blocks of 128 and more
    assert (
        0
        < result["largest_gather_gib"]
        <= max(result["largest_layer_gib"], result["embedding_gib"])
    )
    # Every frozen kernel of a decoder layer is gathered forward and backward, half of it from the other chip.
    kernels = 2 * 2 * (128 * (2 * 256 + 2 * 128) + 3 * 128 * 256) / 2**30
    assert result["collective_gib_by_kind"]["all-gather"] > 2 * kernels / 2
    assert result["audio_hours_per_step"] == pytest.approx(4 * 4 * 2 / 3600)
    bounds = result["bound_seconds"]
    assert bounds["compute"] == pytest.approx(result["flops_executed"] / (4 * 197e12))
    assert result["mfu_bound"] == pytest.approx(
        result["flops_minimum"] / (4 * 197e12) / max(bounds.values())
    )
    json.dumps(result)


def test_a_sweep_over_the_devices_at_hand_ranks_what_fits(config, capsys):
    """Eight virtual CPU devices: compiled and counted, but their peak figures are not known."""
    config.model.dtype = "float32"
    result = plan.sweep(
        config, jax.devices(), None, "8 × cpu", rows=[1], fsdp=[2, 3], tensor=[1, 2]
    )
    assert [(ranked["mesh"]["fsdp"], ranked["mesh"]["tensor"]) for ranked in result["ranked"]] == [
        (2, 1),
        (2, 2),
    ]
    printed = capsys.readouterr().out
    assert "fsdp 2, tensor 1, 1 rows a chip: compiles" in printed
    assert "fsdp 2, tensor 2, 1 rows a chip: compiles" in printed
    assert "fsdp 3, tensor 1, 1 rows a chip: config.mesh" in printed
    assert (result["chips"], result["rows_per_chip"], result["fits"], result["bound_seconds"]) == (
        8,
        1,
        None,
        None,
    )
    assert (
        result["hbm_peak_gib"] >= result["hbm_gib"]["arguments"] + result["hbm_gib"]["temporaries"]
    )
    assert (
        result["flops_executed"]
        > result["flops_minimum"]
        == sum(result["flops_minimum_by_term"].values())
    )
    # Weights are gathered, a layer at a time (on CPU in float32, twice their size), and never activations, which are larger.
    assert (
        0
        < result["largest_gather_gib"]
        <= 2 * max(result["largest_layer_gib"], result["embedding_gib"])
    )
    plan.print_table(result)
    assert "bounds                             not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, "does not fit 8 devices"),
        ({"global_batch_size": 7}, "the nearest that does is 8"),
        ({"mesh.fsdp": 8, "model.lora.rank": 4, "base": 100}, "does not divide over fsdp=8"),
        ({"model.remat": "everything"}, "config.model.remat=everything"),
    ],
)
def test_shapes_that_do_not_divide_end_in_one_line(config, tmp_path, changes, message):
    for name, value in changes.items():
        if name == "base":
            sizes = QWEN3 | {"hidden_size": value, "head_dim": 50}
            (tmp_path / "llm" / "config.json").write_text(json.dumps(sizes))
        else:
            config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message) as error:
        plan.plan(config, jax.devices(), None, "here")
    assert "\n" not in str(error.value)


def test_the_command_prints_a_table_and_json(tmp_path):
    """The devices at hand, four processors' worth; what they can do at most is not known."""
    tiny_experiment.write(tmp_path / "tiny")
    command = [
        sys.executable,
        "-m",
        "fastslm_jax.plan",
        f"--config={tmp_path}/tiny/config.py",
        "--rows_per_chip=1",
    ]
    flags = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    }
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=True
    )
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert (result["topology"], result["chips"], result["rows_per_chip"]) == ("4 × cpu", 4, 1)
    assert f"FLOPs executed                     {result['flops_executed']:.4g}" in table


def test_arguments_that_no_chip_holds_are_refused_before_compiling(config):
    small = dataclasses.replace(chips.CHIPS[0], hbm_bytes=1e6)
    message = r"a train step needs at least 0\.\d+ GiB per device .*; no mesh of these devices fits"
    with pytest.raises(memory.CapacityError, match=message):
        plan.plan(config, jax.devices(), small, "here")
