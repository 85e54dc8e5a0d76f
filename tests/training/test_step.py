"""The train step on a fixed batch, and its chunked loss."""

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
from fastslm_jax.models.spec_augment import SpecAugment
from fastslm_jax.training import optim
from fastslm_jax.training.step import (
    StepConfig,
    TrainState,
    batch_loss,
    label_loss,
    train_step,
    with_token_noise,
)


@pytest.fixture(scope="module")
def split_params(params):
    mask = optim.trainable_mask(sorted(flatten_dict(params, sep="/")), config_lib.TRAINABLE)
    return optim.split(params, mask)


@pytest.fixture(scope="module")
def optimizer():
    return optim.make_optimizer("adamw", optax.constant_schedule(3e-2))


@pytest.fixture(scope="module")
def make_step(model, optimizer, row_shape):
    """make_step(**settings of StepConfig) → the jitted step."""

    @functools.cache
    def make(mesh=None, **changes):
        settings = StepConfig(row_shape.labels, loss_chunk=16, **changes)
        step = functools.partial(
            train_step, model=model, optimizer=optimizer, settings=settings, mesh=mesh
        )
        return jax.jit(step)

    return make


@pytest.fixture(scope="module")
def start(split_params, optimizer):
    return TrainState.create(split_params[0], optimizer)


@pytest.fixture(scope="module")
def first(make_step, start, split_params, batch):
    """The state and the metrics after one step."""
    return make_step()(start, split_params[1], batch)


# -------------------------------------------------------------------------------------------- step


def test_the_loss_is_the_mean_over_labels(model, params, batch, first, row_shape):
    loss_fn = functools.partial(batch_loss, model, label_slots=row_shape.labels)
    sums = jax.jit(loss_fn)(params, batch)
    _, metrics = first
    assert metrics["labels"] == sums["labels"] == batch["loss_mask"].sum() > 0
    np.testing.assert_allclose(metrics["loss"], sums["loss"] / sums["labels"], rtol=1e-5)
    uniform = np.log(model.llm.vocab_size)  # the loss of random weights is near it
    assert uniform - 1 < metrics["loss"] < uniform + 1


def test_the_loss_decreases(make_step, first, split_params, batch):
    (state, metrics), losses = first, [float(first[1]["loss"])]
    for _ in range(9):
        state, metrics = make_step()(state, split_params[1], batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.75 * losses[0]
    assert metrics["accuracy"] > first[1]["accuracy"]
    assert (state.step, state.skipped) == (10, 0)


def test_every_trained_parameter_is_updated(start, first, split_params):
    trained, frozen = split_params
    state, metrics = first
    assert set(state.trained) == set(trained)
    assert not set(trained) & set(frozen)
    unchanged = [
        path for path, leaf in state.trained.items() if np.array_equal(leaf, start.trained[path])
    ]
    assert unchanged == []
    squares = [
        np.sum(np.square(state.trained[path] - leaf)) for path, leaf in start.trained.items()
    ]
    np.testing.assert_allclose(metrics["update_norm"], np.sqrt(sum(squares)), rtol=1e-4)


def test_any_other_subset_can_be_trained(make_step, optimizer, params, batch):
    """The encoder, which the recipe freezes, and one norm of the decoder."""
    table = [(r"encoder/layers/.*", True), (r"llm/final_norm/scale", True), (r".*", False)]
    mask = optim.trainable_mask(sorted(flatten_dict(params, sep="/")), table)
    trained, frozen = optim.split(params, mask)
    before = TrainState.create(trained, optimizer)
    after, metrics = make_step()(before, frozen, batch)
    expected = {path for path in mask if path.startswith("encoder/layers/")}
    assert set(after.trained) == expected | {"llm/final_norm/scale"}
    assert [path for path in trained if np.array_equal(after.trained[path], trained[path])] == []
    assert metrics["grad_norm"] > 0


PLAIN = {"window_batch": 0, "remat": "none", "scan_layers": True}
VARIANTS = {
    "remat": {"remat": "full"},
    "remat dots": {"remat": "dots"},
    "remat by name": {"remat": "attention,query,key,value,out"},
    "window groups": {"window_batch": 2},
    "window groups with remat": {"window_batch": 2, "remat": "full"},
    "unrolled": {"scan_layers": False},
    "unrolled with remat": {"scan_layers": False, "remat": "full"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_options_do_not_change_gradients(model, split_params, batch, row_shape, variant):
    trained, frozen = split_params

    def gradients(window_batch: int, remat: str, scan_layers: bool):
        llm, encoder = (
            module.clone(remat=remat, scan_layers=scan_layers)
            for module in (model.llm, model.encoder)
        )
        changed = dataclasses.replace(model, llm=llm, encoder=encoder, window_batch=window_batch)

        def loss(trained):
            params = optim.merge(trained, frozen)
            sums = batch_loss(changed, params, batch, label_slots=row_shape.labels, loss_chunk=16)
            return sums["loss"] / sums["labels"]

        return jax.jit(jax.value_and_grad(loss))(trained)

    loss, leaves = gradients(**PLAIN | VARIANTS[variant])
    expected_loss, expected = gradients(**PLAIN)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for path, leaf in expected.items():
        np.testing.assert_allclose(
            leaves[path], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=path
        )


def test_micro_batches_add_up_to_the_batch(make_step, start, first, split_params, batch):
    """Compares loss and Adam's moments: the first moments are a tenth of the gradients."""
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


def test_a_non_finite_step_is_skipped_and_counted(make_step, start, split_params, batch):
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
    assert (state.step, state.skipped) == (3, 0)  # the count is of consecutive steps


def test_one_device_and_a_mesh_of_eight_give_the_same_step(
    make_step, first, split_params, batch, optimizer
):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    trained, frozen = (
        jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
        for leaves in split_params
    )
    state, metrics = make_step(mesh=mesh)(
        TrainState.create(trained, optimizer), frozen, sharding.shard_batch(batch, mesh)
    )
    for name in ("loss", "accuracy", "labels", "grad_norm"):
        np.testing.assert_allclose(metrics[name], first[1][name], rtol=1e-5, err_msg=name)
    assert len(state.trained["llm/layers/query/lora_a"].sharding.device_set) == 8
    moments = first_moments(state)  # a tenth of the gradients
    for path, leaf in first_moments(first[0]).items():
        np.testing.assert_allclose(
            moments[path], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=path
        )


def first_moments(state: TrainState) -> dict[str, jax.Array]:
    def is_adam(leaf) -> bool:
        return isinstance(leaf, optax.ScaleByAdamState)

    return next(
        leaf.mu for leaf in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(leaf)
    )


# ------------------------------------------------------------------------------------- token noise


def test_token_noise_replaces_answer_tokens_and_keeps_labels(batch, row_shape):
    noisy = with_token_noise(batch, jax.random.key(0), 0.5, row_shape.labels)
    is_answer = np.pad(batch["loss_mask"] > 0, ((0, 0), (1, 0)))[:, :-1]
    changed = np.asarray(noisy["tokens"]) != batch["tokens"]
    assert not changed[~is_answer].any()
    assert 0.2 < changed[is_answer].mean() < 0.6  # some are replaced by an equal token
    for row, is_changed in enumerate(changed):
        labels = batch["labels"][row][batch["loss_mask"][row] > 0]
        assert set(np.asarray(noisy["tokens"])[row][is_changed]) <= set(labels.tolist())
    assert all(noisy[name] is batch[name] for name in batch if name != "tokens")


def test_the_step_applies_token_noise(make_step, start, first, split_params, batch):
    _, metrics = make_step(input_token_noise=0.5)(start, split_params[1], batch)
    assert metrics["labels"] == first[1]["labels"]
    assert metrics["loss"] != first[1]["loss"]


# ------------------------------------------------------------------------------------ SpecAugment


def test_the_step_masks_features_by_its_number(make_step, start, first, split_params, batch):
    masks = SpecAugment(freq_masks=2, freq_width=4, time_masks=2, time_width=0.2)
    step = make_step(spec_augment=masks)
    _, metrics = step(start, split_params[1], batch)
    _, again = step(start, split_params[1], batch)
    _, later = step(start.replace(step=jnp.int32(1)), split_params[1], batch)
    assert metrics["labels"] == first[1]["labels"]
    assert metrics["loss"] == again["loss"]
    assert len({float(m["loss"]) for m in (metrics, later, first[1])}) == 3


def test_scores_have_no_masks(model, params, batch, row_shape):
    masks = SpecAugment(freq_masks=2, freq_width=4)
    loss_fn = functools.partial(batch_loss, model, label_slots=row_shape.labels)
    plain = jax.jit(loss_fn)(params, batch)
    masked = jax.jit(functools.partial(loss_fn, spec_augment=masks))(params, batch)
    assert plain["loss"] == masked["loss"]


# ------------------------------------------------------------------------------------ chunked loss

ROWS, LENGTH, WIDTH, VOCAB = 3, 20, 8, 11
COUNTS = (7, 0, 4)  # labels of each row


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    mask = np.zeros((ROWS, LENGTH), np.float32)
    for row, count in enumerate(COUNTS):
        mask[row, rng.choice(LENGTH, count, replace=False)] = 1
    return {
        "hidden": rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
        "table": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "labels": rng.integers(0, VOCAB, (ROWS, LENGTH)),
        "mask": mask,
    }


def chunked(hidden, table, arrays, label_slots, chunk):
    return label_loss(
        lambda state: state @ table.T, hidden, arrays["labels"], arrays["mask"], label_slots, chunk
    )


def plain(hidden, table, arrays):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, arrays["labels"])
    return jnp.sum(losses * arrays["mask"])


@pytest.mark.parametrize(("label_slots", "chunk"), [(7, 512), (7, 7), (7, 3), (7, 1), (20, 6)])
def test_chunked_sums_equal_the_plain_loss(arrays, label_slots, chunk):
    sums = chunked(arrays["hidden"], arrays["table"], arrays, label_slots, chunk)
    predicted = (arrays["hidden"] @ arrays["table"].T).argmax(-1)
    expected = float(plain(arrays["hidden"], arrays["table"], arrays))
    assert sums["loss"] == pytest.approx(expected, rel=1e-5)
    assert sums["labels"] == sum(COUNTS)
    assert sums["correct"] == ((predicted == arrays["labels"]) * arrays["mask"]).sum()


def test_chunked_gradients_equal_those_of_the_plain_loss(arrays):
    gradients = jax.grad(lambda h, t: chunked(h, t, arrays, 7, 3)["loss"], argnums=(0, 1))(
        arrays["hidden"], arrays["table"]
    )
    expected = jax.grad(plain, argnums=(0, 1))(arrays["hidden"], arrays["table"], arrays)
    for gradient, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, right, atol=1e-5)
    assert not gradients[0][arrays["mask"] == 0].any()


def test_a_batch_without_labels_has_no_loss(arrays):
    empty = arrays | {"mask": np.zeros_like(arrays["mask"])}
    sums = chunked(empty["hidden"], empty["table"], empty, 7, 3)
    assert (sums["loss"], sums["labels"], sums["correct"]) == (0, 0, 0)


def test_logits_are_computed_one_chunk_at_a_time(arrays):
    seen = []

    def logits_fn(state):
        seen.append(state.shape)
        return state @ arrays["table"].T

    label_loss(logits_fn, arrays["hidden"], arrays["labels"], arrays["mask"], 7, 3)
    assert set(seen) == {(ROWS, 3, WIDTH)}
