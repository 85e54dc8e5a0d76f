"""Reading and writing safetensors files, and atomic folders."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastslm_jax.errors import UserError
from fastslm_jax.weights.tensors import (
    ConversionError,
    SafetensorsSource,
    Tensor,
    atomic_folder,
    write_safetensors,
    write_sharded,
)

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(6, dtype=np.float16).reshape(1, 6),
    "bfloat": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.0),
    "nothing": np.zeros((0, 4), np.float32),
}


def lazy(arrays):
    return [
        Tensor(key, value.shape, value.dtype, lambda value=value: value)
        for key, value in arrays.items()
    ]


def test_written_files_are_readable_by_the_safetensors_library(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", lazy(ARRAYS))
    theirs = load_file(tmp_path / "a.safetensors")
    ours = SafetensorsSource(tmp_path / "a.safetensors")
    assert theirs.keys() == ours.keys() == ARRAYS.keys()
    for key, value in ARRAYS.items():
        for read in (theirs[key], ours.read(key)):
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(read, value)
    assert ours.dtype("bfloat") == "BF16"


def test_slices_are_read_only_views(tmp_path):
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        source.read("x", (slice(1, 3), slice(2, 4))), ARRAYS["matrix"][1:3, 2:4]
    )
    with pytest.raises(ValueError, match="read-only"):
        source.read("x")[0] = 1


def test_unaligned_data(tmp_path):
    """Headers may have any length, so tensors may start at odd byte offsets."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)
    data = np.arange(3, dtype=np.float32)
    (tmp_path / "a.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data.tobytes()
    )
    np.testing.assert_array_equal(SafetensorsSource(tmp_path / "a.safetensors").read("x"), data)


def test_duplicate_names_are_not_written(tmp_path):
    tensors = lazy({"x": ARRAYS["matrix"]}) * 2
    with pytest.raises(ConversionError, match="duplicate tensor x"):
        write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConversionError, match="duplicate tensor in two shards"):
        write_sharded(tmp_path, tensors, max_bytes=50)


def test_a_tensor_larger_than_a_shard_gets_its_own_shard(tmp_path):
    tensors = lazy({"a": np.zeros(100), "b": np.zeros(2), "c": np.zeros(2)})
    assert write_sharded(tmp_path, tensors, max_bytes=64) == 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["a"] != index["b"] == index["c"]


def test_model_safetensors_takes_precedence_in_a_folder(tmp_path):
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "model.safetensors")
    save_file({"y": ARRAYS["matrix"]}, tmp_path / "case_0.safetensors")
    assert SafetensorsSource(tmp_path).keys() == {"x"}


def test_atomic_folder_appears_on_success_only(tmp_path):
    with atomic_folder(tmp_path / "a/b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/file").read_text() == "x"

    def fail():
        with atomic_folder(tmp_path / "c") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_atomic_folder_does_not_overwrite_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("x")
    with pytest.raises(UserError, match="already exists"), atomic_folder(tmp_path / "a"):
        pass
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty/file").exists()
