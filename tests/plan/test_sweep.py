"""A sweep over meshes of the local devices."""

import jax
import pytest

from fastslm_jax import memory
from fastslm_jax.plan import sweep, table


def test_a_sweep_over_local_devices(config, capsys):
    """Eight virtual CPU devices, whose peak figures are unknown: no bounds."""
    config.model.dtype = "float32"
    result = sweep.sweep(
        config, jax.devices(), None, "8 × cpu", rows=[1], fsdp=[2, 3], tensor=[1, 2]
    )
    ranked = [(plan["mesh"]["fsdp"], plan["mesh"]["tensor"]) for plan in result["ranked"]]
    assert ranked == [(2, 1), (2, 2)]
    printed = capsys.readouterr().out
    assert "fsdp 2, tensor 1, 1 rows per chip: compiles" in printed
    assert "fsdp 2, tensor 2, 1 rows per chip: compiles" in printed
    assert "fsdp 3, tensor 1, 1 rows per chip: config.mesh" in printed

    assert (result["chips"], result["rows_per_chip"]) == (8, 1)
    assert result["fits"] is None
    assert result["bound_seconds"] is None
    parts = result["hbm_gib"]
    assert result["hbm_peak_gib"] >= parts["arguments"] + parts["temporaries"]
    assert result["flops_minimum"] == sum(result["flops_minimum_by_term"].values())
    assert result["flops_executed"] > result["flops_minimum"]
    # Weights are gathered one layer at a time (on CPU in float32, twice their size), activations,
    # which are larger, never.
    largest_weight = max(result["largest_layer_gib"], result["embedding_gib"])
    assert 0 < result["largest_gather_gib"] <= 2 * largest_weight
    table.print_table(result)
    assert "bounds                             unknown" in capsys.readouterr().out


def test_a_capacity_error_skips_larger_batches(config, capsys, monkeypatch):
    def plan(*_):
        raise memory.CapacityError("too large")

    monkeypatch.setattr(sweep, "plan", plan)
    message = (
        r"8 × cpu: no fsdp × tensor of 1 × 1, 2 × 1, 4 × 1, 8 × 1 fits with 1, 2 rows per chip"
    )
    with pytest.raises(memory.CapacityError, match=message):
        sweep.sweep(config, jax.devices(), None, "8 × cpu", rows=[1, 2])
    assert capsys.readouterr().out.count("1 rows per chip: too large") == 4
