"""The train step on a fixed batch: it learns, leaves frozen parameters alone, and is one and the same on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from fastslm_jax import config as config_lib
from fastslm_jax import sharding
from fastslm_jax.training import optim
from fastslm_jax.training import step as steps


@pytest.fixture(scope="module")
def split_params(params):
    mask = optim.trainable_mask(sorted(flatten_dict(params, sep="/")), config_lib.TRAINABLE)
    return optim.split(params, mask)


@pytest.fixture(scope="module")
def optimizer():
    return optim.make_optimizer("adamw", optax.constant_schedule(3e-2))


@pytest.fixture(scope="module")
def make_step(model, optimizer, row_shape):
    @functools.cache
    def make(accumulate: int = 1, mesh=None):
        return jax.jit(
            functools.partial(
                steps.train_step, model=model, optimizer=optimizer, seed=0, label_slots=row_shape.labels, loss_chunk=16,
                accumulate=accumulate, mesh=mesh,
            )
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def start(split_params, optimizer):
    return steps.TrainState.create(split_params[0], optimizer)


@pytest.fixture(scope="module")
def first(make_step, start, split_params, batch):
    """The state and metrics after one step."""
    return make_step()(start, split_params[1], batch)


def test_the_loss_is_the_mean_over_labels(model, params, batch, first, row_shape):
    sums = jax.jit(functools.partial(steps.batch_loss, model, label_slots=row_shape.labels))(
        params, batch
    )
    _, metrics = first
    assert metrics["labels"] == sums["labels"] == batch["loss_mask"].sum() > 0
    np.testing.assert_allclose(metrics["loss"], sums["loss"] / sums["labels"], rtol=1e-5)
    assert (
        np.log(model.llm.vocab_size) - 1 < metrics["loss"] < np.log(model.llm.vocab_size) + 1
    )  # random weights


def test_the_loss_falls_and_counters_count(make_step, first, split_params, batch):
    (state, metrics), losses = first, [float(first[1]["loss"])]
    for _ in range(9):
        state, metrics = make_step()(state, split_params[1], batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.75 * losses[0]
    assert metrics["accuracy"] > first[1]["accuracy"]
    assert (state.step, state.skipped) == (10, 0)


def test_every_trained_parameter_moves_and_only_those_exist(start, first, split_params):
    trained, frozen = split_params
    state, metrics = first
    assert set(state.trained) == set(trained)
    assert not set(trained) & set(frozen)
    still = [
        path for path, leaf in state.trained.items() if np.array_equal(leaf, start.trained[path])
    ]
    assert still == []
    moved = np.sqrt(
        sum(np.sum(np.square(state.trained[path] - leaf)) for path, leaf in start.trained.items())
    )
    np.testing.assert_allclose(metrics["update_norm"], moved, rtol=1e-4)


def test_any_other_subset_can_be_trained(make_step, optimizer, params, batch):
    """The encoder, which the recipe freezes, and one norm of the decoder: all of them move, and nothing else has state."""
    table = [(r"encoder/layers/.*", True), (r"llm/final_norm/scale", True), (r".*", False)]
    mask = optim.trainable_mask(sorted(flatten_dict(params, sep="/")), table)
    trained, frozen = optim.split(params, mask)
    before = steps.TrainState.create(trained, optimizer)
    after, metrics = make_step()(before, frozen, batch)
    assert set(after.trained) == {path for path in mask if path.startswith("encoder/layers/")} | {
        "llm/final_norm/scale"
    }
    assert [path for path in trained if np.array_equal(after.trained[path], trained[path])] == []
    assert metrics["grad_norm"] > 0


PLAIN = {"window_batch": 0, "remat": "none", "scan_layers": True}
WAYS = {
    "remat": {"remat": "full"},
    "remat dots": {"remat": "dots"},
    "remat by name": {"remat": "attention,query,key,value,out"},
    "windows in groups": {"window_batch": 2},
    "windows in groups, twice": {"window_batch": 2, "remat": "full"},
    "unrolled": {"scan_layers": False},
    "unrolled, with remat": {"scan_layers": False, "remat": "full"},
}


@pytest.mark.parametrize("way", WAYS)
def test_how_it_is_computed_changes_no_gradient(model, split_params, batch, row_shape, way):
    trained, frozen = split_params

    def gradients(window_batch: int, remat: str, scan_layers: bool):
        llm, encoder = (
            module.clone(remat=remat, scan_layers=scan_layers)
            for module in (model.llm, model.encoder)
        )
        lean = dataclasses.replace(model, llm=llm, encoder=encoder, window_batch=window_batch)

        def loss(trained):
            sums = steps.batch_loss(
                lean,
                optim.merge(trained, frozen),
                batch,
                label_slots=row_shape.labels,
                loss_chunk=16,
            )
            return sums["loss"] / sums["labels"]

        return jax.jit(jax.value_and_grad(loss))(trained)

    (loss, leaves), (expected_loss, expected) = gradients(**PLAIN | WAYS[way]), gradients(**PLAIN)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for path, leaf in expected.items():
        np.testing.assert_allclose(
            leaves[path], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=path
        )


def test_micro_batches_add_up_to_the_batch(make_step, start, first, split_params, batch):
    """Loss and gradients (Adam's first moments are a tenth of them) of two micro-batches are those of the batch."""
    whole, whole_metrics = first
    parts, metrics = make_step(accumulate=2)(start, split_params[1], batch)
    for name in ("loss", "accuracy", "labels", "grad_norm"):
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)
    moments = [
        [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim] for state in (parts, whole)
    ]
    largest = max(np.abs(leaf).max() for leaf in moments[1])
    assert largest > 1e-3
    for leaf, expected in zip(*moments, strict=True):
        np.testing.assert_allclose(leaf, expected, atol=1e-5 * largest)


def test_a_batch_that_is_not_finite_is_skipped_and_counted(make_step, start, split_params, batch):
    broken = split_params[1] | {"llm/final_norm/scale": jnp.full(32, jnp.nan, jnp.float32)}
    state, metrics = make_step()(start, broken, batch)
    assert np.isnan(metrics["loss"])
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.trained, state.opt_state),
        (start.trained, start.opt_state),
    )
    assert (state.step, state.skipped, metrics["skipped"]) == (1, 1, 1)
    state, _ = make_step()(state, broken, batch)
    assert (state.step, state.skipped) == (2, 2)
    state, _ = make_step()(state, split_params[1], batch)
    assert (state.step, state.skipped) == (3, 0)  # in a row


def test_one_device_and_a_mesh_of_eight_take_the_same_step(
    make_step, start, first, split_params, batch, optimizer
):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    trained, frozen = (
        jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
        for leaves in split_params
    )
    step = make_step(mesh=mesh)
    state, metrics = step(
        steps.TrainState.create(trained, optimizer), frozen, sharding.shard_batch(batch, mesh)
    )
    for name in ("loss", "accuracy", "labels", "grad_norm"):
        np.testing.assert_allclose(metrics[name], first[1][name], rtol=1e-5, err_msg=name)
    assert len(state.trained["llm/layers/query/lora_a"].sharding.device_set) == 8
    moments = first_moments(state)  # a tenth of the gradients
    for path, leaf in first_moments(first[0]).items():
        np.testing.assert_allclose(
            moments[path], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=path
        )


def first_moments(state: steps.TrainState) -> dict[str, jax.Array]:
    def is_adam(leaf) -> bool:
        return isinstance(leaf, optax.ScaleByAdamState)

    return next(
        leaf.mu for leaf in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(leaf)
    )


def test_replaced_tokens_are_other_answer_tokens_and_labels_stay(batch, row_shape):
    replaced = steps.with_token_noise(batch, jax.random.key(0), 0.5, row_shape.labels)
    is_answer = np.pad(batch["loss_mask"] > 0, ((0, 0), (1, 0)))[:, :-1]
    changed = np.asarray(replaced["tokens"]) != batch["tokens"]
    assert not changed[~is_answer].any()
    assert 0.2 < changed[is_answer].mean() < 0.6  # some are replaced by themselves
    for row, is_changed in enumerate(changed):
        labels = batch["labels"][row][batch["loss_mask"][row] > 0]
        assert set(np.asarray(replaced["tokens"])[row][is_changed]) <= set(labels.tolist())
    assert all(replaced[name] is batch[name] for name in batch if name != "tokens")


def test_tokens_are_replaced_in_the_step_alone(
    model, optimizer, make_step, start, first, split_params, batch, row_shape
):
    step = functools.partial(
        steps.train_step, model=model, optimizer=optimizer, seed=0, label_slots=row_shape.labels
    )
    _, metrics = jax.jit(functools.partial(step, loss_chunk=16, input_token_noise=0.5))(
        start, split_params[1], batch
    )
    assert metrics["labels"] == first[1]["labels"]
    assert metrics["loss"] != first[1]["loss"]
