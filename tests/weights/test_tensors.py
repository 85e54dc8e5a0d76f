"""Files of tensors: what is written can be read by others, slices are read alone, and folders appear whole or not at all."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastslm_jax.errors import UserError
from fastslm_jax.weights.engine import Rule, StoredLeaf, load, open_leaves, store
from fastslm_jax.weights.tensors import (
    ArraySource,
    ConversionError,
    SafetensorsSource,
    Tensor,
    finished_folder,
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


def test_others_read_what_is_written(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", lazy(ARRAYS))
    theirs, ours = (
        load_file(tmp_path / "a.safetensors"),
        SafetensorsSource(tmp_path / "a.safetensors"),
    )
    assert theirs.keys() == ours.keys() == ARRAYS.keys()
    for key, value in ARRAYS.items():
        for read in (theirs[key], ours.read(key)):
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(read, value)
    assert ours.dtype("bfloat") == "BF16"


def test_slices(tmp_path):
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "a.safetensors")
    source = SafetensorsSource(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        source.read("x", (slice(1, 3), slice(2, 4))), ARRAYS["matrix"][1:3, 2:4]
    )
    with pytest.raises(ValueError, match="read-only"):
        source.read("x")[0] = 1


def test_a_header_of_any_length(tmp_path):
    """The format pads headers, but need not: tensors may begin at odd bytes."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)
    data = np.arange(3, dtype=np.float32)
    (tmp_path / "a.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data.tobytes()
    )
    np.testing.assert_array_equal(SafetensorsSource(tmp_path / "a.safetensors").read("x"), data)


def test_a_name_that_comes_twice_is_not_written(tmp_path):
    tensors = lazy({"x": ARRAYS["matrix"]}) * 2
    with pytest.raises(ConversionError, match="tensor x comes twice"):
        write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConversionError, match="a tensor comes twice"):
        write_sharded(tmp_path, tensors, max_bytes=50)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    assert (
        write_sharded(
            tmp_path, lazy({"a": np.zeros(100), "b": np.zeros(2), "c": np.zeros(2)}), max_bytes=64
        )
        == 2
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["a"] != index["b"] == index["c"]


def test_a_single_file_stands_before_others_in_its_folder(tmp_path):
    save_file({"x": ARRAYS["matrix"]}, tmp_path / "model.safetensors")
    save_file({"y": ARRAYS["matrix"]}, tmp_path / "case_0.safetensors")
    assert SafetensorsSource(tmp_path).keys() == {"x"}


def test_folders_appear_whole_or_not_at_all(tmp_path):
    with finished_folder(tmp_path / "a/b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/file").read_text() == "x"

    def fail():
        with finished_folder(tmp_path / "c") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(UserError, match="exists already"), finished_folder(tmp_path / "a"):
        pass
    (tmp_path / "empty").mkdir()
    with finished_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty/file").exists()


# --------------------------------------------------------------------------------------------------------------- engine

LAYOUT = {
    "kernel": Rule("h.{layer}.w", permute=(1, 0)),
    "conv": Rule("conv.w", permute=(2, 1, 0)),
    "query": Rule("q", lead=1),
}
TENSORS = {
    "h.0.w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "h.1.w": np.arange(6, 12, dtype=np.float32).reshape(2, 3),
    "conv.w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "q": np.arange(4, dtype=np.float32).reshape(1, 2, 2),
}
TREE = {
    "kernel": np.zeros((2, 3, 2), np.float32),
    "conv": np.zeros((4, 3, 2), np.float32),
    "query": np.zeros((2, 2), np.float32),
}


class Shape:
    """A leaf to be read: a shape, a type, and no sharding."""

    def __init__(self, like):
        self.shape, self.dtype = like.shape, like.dtype


def shapes():
    return {path: Shape(leaf) for path, leaf in TREE.items()}


def test_layers_are_stacked_and_axes_permuted_both_ways():
    tree = load(ArraySource(TENSORS), LAYOUT, shapes())
    np.testing.assert_array_equal(tree["kernel"][1], TENSORS["h.1.w"].T)
    np.testing.assert_array_equal(tree["conv"], TENSORS["conv.w"].transpose(2, 1, 0))
    np.testing.assert_array_equal(tree["query"], TENSORS["q"][0])
    back = dict(store(tree, LAYOUT))
    assert back.keys() == TENSORS.keys()
    assert all(
        np.array_equal(back[key], TENSORS[key]) and back[key].shape == TENSORS[key].shape
        for key in TENSORS
    )


def test_opened_leaves_are_read_when_asked_for():
    leaves = open_leaves(ArraySource(TENSORS), LAYOUT, shapes())
    assert isinstance(leaves["kernel"], StoredLeaf)
    tree = load(ArraySource(TENSORS), LAYOUT, shapes())
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf.read(), tree[path])
    assert all(np.array_equal(value, TENSORS[key]) for key, value in store(leaves, LAYOUT))


STRICT = {
    "missing": ({"h.1.w": None}, "tensor h.1.w is missing"),
    "extra": ({"h.2.w": TENSORS["h.0.w"]}, "tensor h.2.w has no place in this model"),
    "misshapen": (
        {"q": TENSORS["q"][0]},
        r"tensor q has shape \(2, 2\), the model's is \(1, 2, 2\)",
    ),
    "integers": ({"q": TENSORS["q"].astype(np.int64)}, "tensor q has type I64"),
}


@pytest.mark.parametrize("name", STRICT)
def test_strictness(name):
    change, message = STRICT[name]
    tensors = {key: value for key, value in (TENSORS | change).items() if value is not None}
    with pytest.raises(ConversionError, match=message):
        load(ArraySource(tensors, "file"), LAYOUT, shapes())


def test_a_parameter_without_a_name_in_the_layout():
    with pytest.raises(ConversionError, match="the layout has no name for parameter other"):
        load(ArraySource(TENSORS), LAYOUT, shapes() | {"other": Shape(TREE["query"])})
