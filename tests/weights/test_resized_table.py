"""Embedding tables with appended rows."""

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastslm_jax import sharding
from fastslm_jax.weights import engine
from fastslm_jax.weights.engine import Rule
from fastslm_jax.weights.resized_table import ResizedTable
from fastslm_jax.weights.tensors import ConversionError, SafetensorsSource

TABLE = np.arange(5 * 8, dtype=np.float32).reshape(5, 8)
LONGER = np.concatenate([TABLE, np.tile(TABLE[2], (3, 1))])  # row 2 is the mean


@pytest.fixture
def source(tmp_path):
    tensors = {"table": TABLE, "half": TABLE.astype(ml_dtypes.bfloat16), "norm": np.ones(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    return ResizedTable(SafetensorsSource(tmp_path), ["table", "half", "absent"], rows=5, added=3)


def test_new_rows_are_the_mean(source):
    assert (source.shape("table"), source.shape("norm")) == ((8, 8), (5,))
    assert source.keys() == {"table", "half", "norm"}
    np.testing.assert_array_equal(source.read("table"), LONGER)
    np.testing.assert_array_equal(source.read("norm"), np.ones(5))
    assert source.read("half").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(source.read("half"), LONGER.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("rows", [(0, 5), (0, 8), (3, 6), (5, 8), (6, 7), (2, 4)])
def test_slices(source, rows):
    index = (slice(*rows), slice(2, 7))
    np.testing.assert_array_equal(source.read("table", index), LONGER[index])


def test_each_device_gets_its_slice(source):
    mesh = sharding.make_mesh(1, 4, 2)
    spec = jax.sharding.PartitionSpec("tensor", "fsdp")
    placed = jax.sharding.NamedSharding(mesh, spec)
    leaf = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=placed)
    loaded = engine.load(source, {"t": Rule("table")}, {"t": leaf}, ["half", "norm"])
    np.testing.assert_array_equal(loaded["t"], LONGER)


def test_a_table_of_another_size_is_not_extended(tmp_path):
    save_file({"table": TABLE}, tmp_path / "model.safetensors")
    source = ResizedTable(SafetensorsSource(tmp_path), ["table"], rows=4, added=4)
    leaf = jax.ShapeDtypeStruct((8, 8), np.float32)
    with pytest.raises(ConversionError, match=r"table has shape \(5, 8\), expected \(8, 8\)"):
        engine.load(source, {"t": Rule("table")}, {"t": leaf})
