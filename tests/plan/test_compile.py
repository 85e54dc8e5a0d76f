"""Plans of a tiny model: for a TPU slice and for the local devices, and their errors."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import pytest

from fastslm_jax import chips, memory
from fastslm_jax.errors import UserError
from fastslm_jax.plan.compile import plan, set_rows

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="requires the TPU compiler (libtpu)"
)


@needs_tpu_compiler
def test_a_plan_for_a_tpu_slice(config):
    config.model.remat = "attention,query,key,value,out"
    topology = chips.parse_topology("v5e:2x2")
    devices = topology.devices()
    set_rows(config, devices, topology.chip, rows_per_chip=1)
    result = plan(config, devices, topology.chip, "v5e:2x2")
    assert (result["topology"], result["chips"]) == ("v5e:2x2", 4)
    assert result["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert result["fits"]
    assert result["hbm_capacity_gib"] == 16
    parts = result["hbm_gib"]
    inputs = sum(parts[kind] for kind in ("frozen", "trained", "optimizer", "batch"))
    assert inputs <= parts["arguments"] <= result["hbm_peak_gib"]
    # The rows are short: attention kernels work on blocks of at least 128.
    assert 1.0 < result["flops_executed"] / result["flops_minimum"] < 4
    largest_weight = max(result["largest_layer_gib"], result["embedding_gib"])
    assert 0 < result["largest_gather_gib"] <= largest_weight
    # Every frozen decoder kernel is gathered forward and backward, half of it from the other chip.
    kernels = 2 * 2 * (128 * (2 * 256 + 2 * 128) + 3 * 128 * 256) / 2**30
    assert result["collective_gib_by_kind"]["all-gather"] > 2 * kernels / 2
    assert result["audio_hours_per_step"] == pytest.approx(4 * 4 * 2 / 3600)
    bounds = result["bound_seconds"]
    assert bounds["compute"] == pytest.approx(result["flops_executed"] / (4 * 197e12))
    mfu = result["flops_minimum"] / (4 * 197e12) / max(bounds.values())
    assert result["mfu_bound"] == pytest.approx(mfu)
    json.dumps(result)


@needs_tpu_compiler
@pytest.mark.parametrize("adapter", ["pooling", "stack", "wq_former", "sq_former"])
def test_a_plan_of_every_other_adapter(config, adapter):
    """Windows of 2 s with 4 tokens."""
    config.model.update({"adapter": adapter, "compression_size": 4, "remat": "full"})
    topology = chips.parse_topology("v5e:2x2")
    devices = topology.devices()
    set_rows(config, devices, topology.chip, rows_per_chip=1)
    result = plan(config, devices, topology.chip, "v5e:2x2")
    assert 0 < result["hbm_gib"]["trained"] < result["hbm_peak_gib"] < 1
    assert result["flops_executed"] > result["flops_minimum"]
    term = "MLP" if adapter in ("pooling", "stack") else "Q-Former layers"
    assert result["flops_minimum_by_term"][term] > 0
    assert "HFQ-Former projection" not in result["flops_minimum_by_term"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, "does not fit 8 devices"),
        ({"global_batch_size": 7}, "the nearest valid size is 8"),
        ({"mesh.fsdp": 8}, "is not divisible by fsdp=8"),
        ({"model.remat": "everything"}, "config.model.remat=everything"),
    ],
)
def test_config_errors_are_one_line(config, changes, message):
    if changes.get("mesh.fsdp") == 8:  # a decoder width that 8 does not divide
        file = pathlib.Path(config.base.llm, "config.json")
        sizes = json.loads(file.read_text()) | {"hidden_size": 100, "head_dim": 50}
        file.write_text(json.dumps(sizes))
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        plan(config, jax.devices(), None, "local")
    assert "\n" not in str(error.value)


def test_inputs_that_exceed_the_memory_are_an_error_before_compiling(config):
    small = dataclasses.replace(chips.CHIPS[0], hbm_bytes=1e6)
    message = r"a train step needs at least 0\.\d+ GiB per device .*; no mesh of these devices fits"
    with pytest.raises(memory.CapacityError, match=message):
        plan(config, jax.devices(), small, "local")
