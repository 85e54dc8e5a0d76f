"""Mapping named tensors to parameters: axis orders, stacked layers, and strict checks."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastslm_jax.weights.engine import Rule, StoredLeaf, load, open_leaves, store
from fastslm_jax.weights.tensors import ConversionError, SafetensorsSource

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
    "kernel": jax.ShapeDtypeStruct((2, 3, 2), np.float32),
    "conv": jax.ShapeDtypeStruct((4, 3, 2), np.float32),
    "query": jax.ShapeDtypeStruct((2, 2), np.float32),
}


@pytest.fixture
def make_source(tmp_path):
    """make_source(tensors) → a safetensors file with them."""

    def make(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return SafetensorsSource(tmp_path / "model.safetensors")

    return make


def test_load_stacks_layers_and_permutes_axes_and_store_inverts_it(make_source):
    tree = load(make_source(TENSORS), LAYOUT, TREE)
    np.testing.assert_array_equal(tree["kernel"][1], TENSORS["h.1.w"].T)
    np.testing.assert_array_equal(tree["conv"], TENSORS["conv.w"].transpose(2, 1, 0))
    np.testing.assert_array_equal(tree["query"], TENSORS["q"][0])
    stored = dict(store(tree, LAYOUT))
    assert stored.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert stored[key].shape == value.shape
        np.testing.assert_array_equal(stored[key], value)


def test_opened_leaves_read_the_same_values_as_load(make_source):
    source = make_source(TENSORS)
    leaves = open_leaves(source, LAYOUT, TREE)
    assert isinstance(leaves["kernel"], StoredLeaf)
    tree = load(source, LAYOUT, TREE)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf.read(), tree[path])
    assert all(np.array_equal(value, TENSORS[key]) for key, value in store(leaves, LAYOUT))


MISMATCHES = {
    "missing": ({"h.1.w": None}, "missing tensor h.1.w"),
    "two missing": ({"h.1.w": None, "q": None}, "missing tensor h.1.w and 1 more"),
    "extra": ({"h.2.w": TENSORS["h.0.w"]}, "unexpected tensor h.2.w"),
    "misshapen": ({"q": TENSORS["q"][0]}, r"tensor q has shape \(2, 2\), expected \(1, 2, 2\)"),
    "integers": ({"q": TENSORS["q"].astype(np.int64)}, "tensor q has dtype I64, expected one of"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatches_raise(name, make_source):
    change, message = MISMATCHES[name]
    tensors = {key: value for key, value in (TENSORS | change).items() if value is not None}
    with pytest.raises(ConversionError, match=message):
        load(make_source(tensors), LAYOUT, TREE)


def test_a_parameter_without_a_rule_raises(make_source):
    with pytest.raises(ConversionError, match="the layout has no rule for parameter other"):
        load(make_source(TENSORS), LAYOUT, TREE | {"other": TREE["query"]})
