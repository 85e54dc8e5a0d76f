"""The table of trainable parameters, the learning rate, and one step of both optimizers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from fastslm_jax import config as config_lib
from fastslm_jax.errors import UserError
from fastslm_jax.training import optim

# ---------------------------------------------------------------------------- trainable parameters


def test_the_first_match_decides():
    table = [(r"hfq/positions", False), (r"hfq/.*", True), (r".*", False)]
    mask = optim.trainable_mask(["hfq/positions", "hfq/query", "llm/kernel"], table)
    assert mask == {"hfq/positions": False, "hfq/query": True, "llm/kernel": False}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            [(r"a/.*", True)],
            r"parameter b/kernel matches no pattern of config.trainable; add one, .* "
            r"\('b/kernel', False\)",
        ),
        (
            [(r"a", True), (r"[ab]/.*", True)],
            r"pattern 'a' of config.trainable decides no parameter",
        ),  # whole paths match
        (
            [(r".*", True), (r"a/.*", False)],
            r"pattern 'a/\.\*' of config.trainable decides no parameter",
        ),
        ([(r".*", False)], "config.trainable trains nothing"),
    ],
)
def test_a_table_that_does_not_fit_the_model_is_an_error(table, message):
    with pytest.raises(optim.TrainableError, match=message):
        optim.trainable_mask(["a/kernel", "b/kernel"], table)


def test_the_default_table_trains_hfq_former_and_lora(params):
    mask = optim.trainable_mask(sorted(flatten_dict(params, sep="/")), config_lib.TRAINABLE)
    assert mask["hfq_former/projection/kernel"]
    assert mask["hfq_former/compressor_1/query"]
    assert mask["llm/layers/query/lora_a"]
    frozen = {path for path, is_trained in mask.items() if not is_trained}
    assert {
        "llm/embed_tokens",
        "llm/layers/query/kernel",
        "encoder/conv1/kernel",
        "encoder/positions",
    } <= frozen
    assert "hfq_former/compressor_1/context_positions" in frozen
    assert all("lora" not in path for path in frozen)


def test_split_and_merge_are_inverse(params):
    leaves = flatten_dict(params, sep="/")
    trained, frozen = optim.split(params, {path: path.startswith("hfq_former/") for path in leaves})
    assert set(trained) | set(frozen) == set(leaves)
    assert all(path.startswith("hfq_former/") for path in trained)
    jax.tree.map(np.testing.assert_array_equal, optim.merge(trained, frozen), params)
    assert optim.count({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}) == 10


# ----------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.1 + 0.9 / 2, 110: 0.1, 500: 0.1}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 110: 1.0}),
    ],
)
def test_schedules(name, rates):
    schedule = optim.schedule(name, peak=2.0, steps=110, warmup_steps=10, final_fraction=0.1)
    assert {step: float(schedule(step)) for step in rates} == pytest.approx(
        {step: 2.0 * rate for step, rate in rates.items()}
    )


def test_without_warmup_the_first_step_has_the_peak():
    assert optim.schedule("linear", 1.0, steps=10, warmup_steps=0)(0) == 1.0


def test_unknown_names_are_errors():
    with pytest.raises(UserError, match="schedule='step' is not one of cosine, linear, constant"):
        optim.schedule("step", 1.0, 10, 1)
    with pytest.raises(UserError, match=r"optimizer\.name='sgd' is not one of adamw, muon"):
        optim.make_optimizer("sgd", optax.constant_schedule(1.0))


# --------------------------------------------------------------------------------------- optimizer


def one_step(optimizer, leaves, gradients):
    updates, _ = optimizer.update(gradients, optimizer.init(leaves), leaves)
    return updates


def test_adamw_steps_by_the_learning_rate_and_decays_matrices():
    leaves = {"a/kernel": jnp.full((2, 2), 10.0), "a/bias": jnp.full(2, 10.0)}
    gradients = {
        "a/kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]),
        "a/bias": jnp.array([5.0, -6.0]),
    }
    optimizer = optim.make_optimizer("adamw", optax.constant_schedule(0.01), weight_decay=0.1)
    updates = one_step(optimizer, leaves, gradients)
    # Adam's first step is rate · sign(gradient); decay subtracts rate · 0.1 · 10, matrices only.
    np.testing.assert_allclose(updates["a/kernel"], [[-0.02, 0.0], [-0.02, 0.0]], atol=1e-5)
    np.testing.assert_allclose(updates["a/bias"], [-0.01, 0.01], atol=1e-5)


def test_muon_steps_matrices_orthogonally_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    leaves = {
        "hfq_former/out/kernel": jnp.zeros((32, 8)),
        "llm/layers/query/lora_a": jnp.zeros((3, 32, 8)),  # three stacked layers: three matrices
        "hfq_former/query": jnp.zeros((4, 8)),
        "hfq_former/out/bias": jnp.zeros(8),
    }
    gradients = {
        path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in leaves.items()
    }
    optimizer = optim.make_optimizer(
        "muon", optax.constant_schedule(0.1), adam_learning_rate_ratio=0.5
    )
    updates = one_step(optimizer, leaves, gradients)
    for step in (updates["hfq_former/out/kernel"], *updates["llm/layers/query/lora_a"]):
        values = np.linalg.svd(np.asarray(step) / 0.1, compute_uv=False)
        # Newton–Schulz iterations bring singular values only near 1.
        np.testing.assert_allclose(values, 1.0, atol=0.35)
    for path in ("hfq_former/query", "hfq_former/out/bias"):
        # Adam's first step is rate · sign(gradient), times the look-ahead of Nesterov momentum.
        ahead = 1 + 0.9 * (1 - 0.9) / (1 - 0.9**2)
        np.testing.assert_allclose(
            updates[path], -0.05 * ahead * np.sign(gradients[path]), atol=1e-3
        )


def test_muon_treats_a_convolution_as_a_matrix_of_taps_and_inputs():
    kernel = jnp.zeros((3, 16, 12))
    gradient = {
        "hfq_former/downsampler_1/conv1/kernel": jax.random.normal(jax.random.key(0), kernel.shape)
    }
    updates = one_step(
        optim.make_optimizer("muon", optax.constant_schedule(1.0)),
        {"hfq_former/downsampler_1/conv1/kernel": kernel},
        gradient,
    )
    step = np.asarray(updates["hfq_former/downsampler_1/conv1/kernel"]).reshape(48, 12)
    np.testing.assert_allclose(np.linalg.svd(step, compute_uv=False), 1.0, atol=0.35)


def test_gradients_are_clipped_by_their_global_norm():
    leaves = {"a/bias": jnp.zeros(2)}
    clipped = optim.make_optimizer("adamw", optax.constant_schedule(1.0), clip_norm=1.0)
    state = clipped.init(leaves)
    _, state = clipped.update({"a/bias": jnp.array([30.0, 40.0])}, state, leaves)
    moments = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "shape", None) == (2,)]
    np.testing.assert_allclose(moments[0], [0.06, 0.08], rtol=1e-5)  # (1 − b1) · gradient / 50


def test_learning_rate_ratios_scale_updates_by_pattern():
    leaves = {
        "llm/layers/query/lora_a": jnp.zeros((1, 8, 4)),
        "hfq_former/out/kernel": jnp.zeros((8, 4)),
    }
    gradients = {
        path: jax.random.normal(jax.random.key(1), leaf.shape) for path, leaf in leaves.items()
    }
    unscaled, scaled = (
        one_step(
            optim.make_optimizer(
                "muon", optax.constant_schedule(0.1), learning_rate_ratios=[("llm/.*", ratio)]
            ),
            leaves,
            gradients,
        )
        for ratio in (1.0, 0.25)
    )
    np.testing.assert_allclose(
        scaled["llm/layers/query/lora_a"],
        0.25 * np.asarray(unscaled["llm/layers/query/lora_a"]),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(
        scaled["hfq_former/out/kernel"], unscaled["hfq_former/out/kernel"]
    )


def test_a_learning_rate_ratio_that_decides_nothing_is_an_error():
    leaves = {"hfq_former/out/kernel": jnp.zeros((8, 4))}
    table = [("hfq_former/.*", 0.5), ("hfq_former/out/.*", 0.1)]  # the first decides both
    with pytest.raises(
        optim.TrainableError,
        match=r"'hfq_former/out/\.\*' of config.optimizer.learning_rate_ratios decides no trained",
    ):
        one_step(
            optim.make_optimizer("adamw", optax.constant_schedule(0.1), learning_rate_ratios=table),
            leaves,
            leaves,
        )


def test_patterns_for_parts_of_an_adapter_may_decide_nothing_without_them():
    """The demo's table fits every adapter, and an HFQ-Former without detail recovery."""
    demo = importlib.import_module("configs.demo").get_config("1")
    table = demo.optimizer.learning_rate_ratios
    adamw = optim.make_optimizer("adamw", optax.constant_schedule(0.1), learning_rate_ratios=table)
    others = {"llm/layers/query/lora_a": jnp.zeros((8, 4))}
    for path in ("hfq_former/projection/kernel", "adapter/layer_0/mlp_in/kernel"):
        leaves = {path: jnp.zeros((8, 4)), **others}
        one_step(adamw, leaves, leaves)


def test_patterns_for_lora_may_decide_nothing_with_rank_0():
    """The default tables also fit a model without LoRA; other patterns are still checked."""
    leaves = {"hfq_former/out/kernel": jnp.zeros((8, 4))}
    paths = [*leaves, "encoder/positions", "llm/embed_tokens"]
    assert optim.trainable_mask(paths, config_lib.TRAINABLE) == {
        "hfq_former/out/kernel": True,
        "encoder/positions": False,
        "llm/embed_tokens": False,
    }
    with pytest.raises(optim.TrainableError, match="lora_c"):
        optim.trainable_mask(paths, (*config_lib.TRAINABLE, (".*/lora_c", True)))
    table = (*config_lib.TRAINABLE, (".*/lora_a", False))
    with pytest.raises(optim.TrainableError, match="lora_a"):  # decided by an earlier pattern
        optim.trainable_mask([*paths, "llm/layers/query/lora_a"], table)
    table = [("llm/.*", 0.1)]
    adamw = optim.make_optimizer("adamw", optax.constant_schedule(0.1), learning_rate_ratios=table)
    one_step(adamw, leaves, leaves)
