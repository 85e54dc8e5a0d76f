"""LoRA in the projection layer: rank 0, zero-initialized B, the per-token gate, and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax.models.lora import LoRA, Projection


def without_lora(tree: dict) -> dict:
    leaves = flatten_dict(tree, sep="/")
    return unflatten_dict(
        {path: leaf for path, leaf in leaves.items() if not path.endswith(("/lora_a", "/lora_b"))},
        sep="/",
    )


def shapes(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def test_projection_values():
    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    projection = Projection(4, use_bias=True, lora=LoRA(rank=2, alpha=6.0))
    weights = projection.init(jax.random.key(1), x)["params"]
    weights = weights | {"bias": jnp.arange(4.0), "lora_b": jnp.ones((2, 4))}
    delta = 3.0 * (x @ weights["lora_a"]) @ jnp.ones((2, 4))  # alpha / rank = 3
    expected = x @ weights["kernel"] + jnp.arange(4.0) + delta
    np.testing.assert_allclose(projection.apply({"params": weights}, x), expected, atol=1e-5)


def test_rank_0_has_no_lora_parameters(model, params):
    plain = model.llm.clone(lora=LoRA())
    tree = jax.eval_shape(
        plain.init, jax.random.key(0), jnp.zeros((1, 2, 32)), jnp.zeros((1, 2), jnp.int32)
    )["params"]
    assert shapes(tree) == shapes(without_lora(params["llm"]))
    adapted = {
        path.split("/")[-2]
        for path in flatten_dict(params["llm"], sep="/")
        if path.endswith("/lora_a")
    }
    assert adapted == {"query", "key", "value", "out", "gate", "up", "down"}


def logits_of(llm, weights, gate=None):
    @jax.jit
    def forward(weights):
        variables, tokens = {"params": weights}, jnp.arange(12).reshape(2, 6)
        positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
        hidden, _ = llm.apply(
            variables, llm.apply(variables, tokens, method="embed"), positions, lora_gate=gate
        )
        return llm.apply(variables, hidden, method="logits")

    return np.asarray(forward(weights))


def test_closed_gate_or_zero_b_matches_the_base_exactly(model, params):
    base = logits_of(model.llm.clone(lora=LoRA()), without_lora(params["llm"]))
    gated = logits_of(model.llm, params["llm"], gate=jnp.zeros((2, 1)))
    np.testing.assert_array_equal(gated, base)

    zero_b = {
        path: leaf * (not path.endswith("/lora_b"))
        for path, leaf in flatten_dict(params["llm"], sep="/").items()
    }
    np.testing.assert_array_equal(logits_of(model.llm, unflatten_dict(zero_b, sep="/")), base)

    assert np.abs(logits_of(model.llm, params["llm"]) - base).max() > 1e-2


def test_gate_is_per_row(model, params):
    on, off = (
        logits_of(model.llm, params["llm"]),
        logits_of(model.llm, params["llm"], gate=jnp.zeros((2, 1))),
    )
    mixed = logits_of(model.llm, params["llm"], gate=jnp.array([[1.0], [0.0]]))
    np.testing.assert_array_equal(mixed[0], on[0])
    np.testing.assert_array_equal(mixed[1], off[1])


def test_dropout_applies_to_the_adapter_only():
    x = jnp.ones((1, 50, 8))
    projection = Projection(4, lora=LoRA(rank=2, dropout=0.5))
    weights = projection.init(jax.random.key(0), x)["params"]
    rngs = {"dropout": jax.random.key(1)}
    base = projection.apply({"params": weights}, x, deterministic=False, rngs=rngs)  # B is zero
    np.testing.assert_array_equal(base, projection.apply({"params": weights}, x))
    weights = weights | {"lora_b": jnp.ones((2, 4))}
    dropped = projection.apply({"params": weights}, x, deterministic=False, rngs=rngs)
    assert len(np.unique(np.asarray(dropped)[0, :, 0])) > 10  # equal rows, different masks
    np.testing.assert_array_equal(
        dropped, projection.apply({"params": weights}, x, deterministic=False, rngs=rngs)
    )
