"""The chunked loss is the plain cross-entropy over the labelled positions, however it is chunked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastslm_jax.training.loss import label_loss

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
def test_sums_are_those_of_the_plain_loss(arrays, label_slots, chunk):
    sums = chunked(arrays["hidden"], arrays["table"], arrays, label_slots, chunk)
    predicted = (arrays["hidden"] @ arrays["table"].T).argmax(-1)
    assert sums["loss"] == pytest.approx(
        float(plain(arrays["hidden"], arrays["table"], arrays)), rel=1e-5
    )
    assert sums["labels"] == sum(COUNTS)
    assert sums["correct"] == ((predicted == arrays["labels"]) * arrays["mask"]).sum()


def test_gradients_are_those_of_the_plain_loss(arrays):
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


def test_logits_exist_for_a_chunk_at_a_time(arrays):
    seen = []

    def logits_fn(state):
        seen.append(state.shape)
        return state @ arrays["table"].T

    label_loss(logits_fn, arrays["hidden"], arrays["labels"], arrays["mask"], 7, 3)
    assert set(seen) == {(ROWS, 3, WIDTH)}
