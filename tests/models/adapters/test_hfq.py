"""HFQ-Former: compressor without projections, feature levels, and independent windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.models.adapters.hfq import Compressor, HFQFormer
from fastslm_jax.models.layers import sinusoids


def test_compressor_values():
    """One head: softmax((LN(query) + sin)(LN(x) + sin)ᵀ / √d) LN(x), then a linear layer."""
    x = np.random.default_rng(0).normal(2.0, 3.0, (1, 6, 8)).astype(np.float32)
    compressor = Compressor(num_queries=2, num_heads=1)
    weights = compressor.init(jax.random.key(0), x)["params"]
    assert set(weights) == {
        "query",
        "query_positions",
        "query_norm",
        "context_positions",
        "context_norm",
        "out",
    }

    def norm(y):
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)

    query, value = norm(np.asarray(weights["query"])) + sinusoids(2, 8), norm(x[0])
    scores = np.exp(query @ (value + sinusoids(6, 8)).T / np.sqrt(8))
    expected = (
        scores / scores.sum(-1, keepdims=True) @ value @ np.asarray(weights["out"]["kernel"])
        + weights["out"]["bias"]
    )
    np.testing.assert_allclose(compressor.apply({"params": weights}, x)[0], expected, atol=1e-5)


def test_lengths_of_the_levels():
    hfq_former = HFQFormer(
        output_width=12,
        stage_tokens=(5, 4, 3),
        compression_size=2,
        detail_recovery_layers=1,
        head_dim=16,
    )
    features = jnp.zeros((3, 50, 32))
    tokens, variables = jax.eval_shape(
        lambda: hfq_former.init_with_output(jax.random.key(0), features)
    )
    assert tokens.shape == (3, 2, 12)
    tree = variables["params"]
    for name, length in {
        "compressor_1": 50,
        "compressor_2": 25,
        "compressor_3": 13,
        "semantic_distillation": 5 + 4 + 3,
    }.items():
        assert tree[name]["context_positions"].shape == (length, 32)
    assert "bias" not in tree["detail_recovery_0"]["self_attention"]["key"]


def test_windows_do_not_attend_to_each_other(model, params):
    features = jax.random.normal(jax.random.key(0), (3, 50, 64))
    forward = jax.jit(
        lambda features: model.adapter.apply({"params": params["hfq_former"]}, features)
    )
    tokens, changed = forward(features), forward(features.at[1].add(1.0))
    np.testing.assert_array_equal(tokens[jnp.array([0, 2])], changed[jnp.array([0, 2])])
    assert np.abs(tokens[1] - changed[1]).max() > 1e-3


def test_width_must_be_a_multiple_of_head_dim():
    with pytest.raises(UserError, match=r"encoder width 96 is not a multiple of 64, the adapter's"):
        HFQFormer(output_width=8).init(jax.random.key(0), jnp.zeros((1, 20, 96)))
