"""Packing: rows within their limits, exact arrays, and unchanged losses and gradients."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fastslm_jax import config as config_lib
from fastslm_jax.audio import CONTEXT, WindowSpec
from fastslm_jax.data.packing import PackingError, RowShape, assemble, pack
from fastslm_jax.data.prompts import Encoded
from fastslm_jax.training import optim
from fastslm_jax.training import step as steps

# ---- The plan


def sizes_of(*windows: int) -> np.ndarray:
    """Examples with these numbers of windows, one token and one label each."""
    return np.array([(count, 1, 1) for count in windows])


def test_an_example_goes_to_the_fullest_row_it_fits_in():
    shape = RowShape(windows=4, tokens=100, labels=100)
    assert pack(sizes_of(3, 2, 1), shape) == [[0, 2], [1]]
    assert pack(sizes_of(3, 2, 1, 2, 4), shape) == [[0, 2], [1, 3], [4]]


@pytest.mark.parametrize(
    "shape", [RowShape(8, 10_000, 10_000), RowShape(100, 300, 10_000), RowShape(100, 10_000, 120)]
)
def test_rows_stay_within_all_limits(shape):
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(1, high, 500) for high in (9, 120, 50)], axis=1)
    rows = pack(sizes, shape, open_rows=16)
    assert sorted(number for row in rows for number in row) == list(range(500))
    for row in rows:
        assert (sizes[row].sum(axis=0) <= dataclasses.astuple(shape)).all()


def test_rows_are_nearly_full():
    sizes = sizes_of(*np.random.default_rng(0).integers(1, 9, 2000))
    rows = pack(sizes, RowShape(16, 10_000, 10_000))
    assert sizes[:, 0].sum() / (16 * len(rows)) > 0.99


def test_an_example_stays_close_to_its_position():
    """With two open rows, the fullest is closed when a third one is opened."""
    sizes, shape = sizes_of(3, 2, 3, 1), RowShape(4, 100, 100)
    assert pack(sizes, shape) == [[0, 3], [1], [2]]
    assert pack(sizes, shape, open_rows=2) == [[0], [1], [2, 3]]


def test_an_example_larger_than_a_row_is_an_error():
    message = "example 1 takes 5 windows, 60 tokens and 7 labels; a row has 4, 100 and 50"
    with pytest.raises(PackingError, match=message):
        pack(np.array([(1, 1, 1), (5, 60, 7)]), RowShape(4, 100, 50))


# ---- The arrays


def test_assembled_arrays():
    """Two examples in a row of 4 windows and 16 tokens, with 2 speech tokens per window.

    The first has 2 windows, its speech tokens starting at position 1; the second has 1 window, its
    speech tokens starting at position 2.
    """
    spec = WindowSpec(frames=100)
    first = Encoded(
        np.array([11, 0, 0, 0, 0, 12, 13, 2]),
        np.array([0, 0, 0, 0, 0, 0, 1, 1], bool),
        speech_start=1,
        num_speech=4,
    )
    second = Encoded(
        np.array([21, 22, 0, 0, 23, 2]),
        np.array([0, 0, 0, 0, 1, 1], bool),
        speech_start=2,
        num_speech=2,
    )
    samples = [np.full(24_000, 7, np.int16), np.full(16_000, 9, np.int16)]
    row = assemble(
        [(first, samples[0]), (second, samples[1])], RowShape(4, 16, 8), spec, tokens_per_window=2
    )

    assert row["tokens"].tolist() == [11, 0, 0, 0, 0, 12, 13, 2, 21, 22, 0, 0, 23, 2, 0, 0]
    assert row["labels"].tolist() == [0, 0, 0, 0, 12, 13, 2, 0, 22, 0, 0, 23, 2, 0, 0, 0]
    assert row["loss_mask"].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1] * 8 + [2] * 6 + [0] * 2
    assert row["position_ids"].tolist() == [*range(8), *range(6), 0, 0]
    assert row["speech_slot"].tolist() == [-1, 0, 1, 2, 3, -1, -1, -1, -1, -1, 4, 5, -1, -1, -1, -1]
    assert row["lora_gate"].tolist() == [1] * 14 + [0] * 2
    assert row["window_frames"].tolist() == [100, 50, 100, 0]
    assert row["window_recording"].tolist() == [1, 1, 2, -1]
    assert row["audio"].shape == (4, 16_000 + 2 * CONTEXT)
    assert set(row["audio"][0]) == {7}
    assert (row["audio"][1] == 7).sum() == CONTEXT + 8_000 + CONTEXT  # half a second and context
    assert set(row["audio"][2]) == {9}
    assert not row["audio"][3].any()
    types = {name: value.dtype.name for name, value in row.items()}
    assert types == dict.fromkeys(types, "int32") | {
        "audio": "int16",
        "loss_mask": "float32",
        "lora_gate": "float32",
    }


def test_an_example_without_audio_disables_lora():
    text = Encoded(np.array([5, 6, 2]), np.array([0, 1, 1], bool), speech_start=-1, num_speech=0)
    row = assemble([(text, None)], RowShape(1, 4, 4), WindowSpec(frames=100), tokens_per_window=2)
    assert row["lora_gate"].tolist() == [0, 0, 0, 0]
    assert row["loss_mask"].tolist() == [1, 1, 0, 0]
    assert row["window_recording"].tolist() == [-1]


# ---- Through the whole model


def test_a_packed_row_is_equivalent_to_one_row_per_example(model, params, make_part, row_shape):
    """Loss and gradients of three examples in one row equal the sums over three separate rows."""
    parts = [
        make_part(1.3, "anna bought eggs", seed=1),
        make_part(0.7, "yes", seed=2),
        make_part(0.9, "on friday in vienna", seed=3),
    ]
    trained, frozen = optim.split(
        params, optim.trainable_mask(sorted(flatten_dict(params, sep="/")), config_lib.TRAINABLE)
    )

    @jax.jit
    def loss_and_gradients(trained, row):
        def loss(trained):
            batch = jax.tree.map(lambda value: value[None], row)
            return steps.batch_loss(
                model, optim.merge(trained, frozen), batch, label_slots=row_shape.labels
            )["loss"]

        return jax.value_and_grad(loss)(trained)

    row_of = functools.partial(
        assemble, shape=row_shape, spec=model.window, tokens_per_window=model.tokens_per_window
    )
    packed_loss, packed = loss_and_gradients(trained, row_of(parts))
    alone = [loss_and_gradients(trained, row_of([part])) for part in parts]
    np.testing.assert_allclose(packed_loss, sum(loss for loss, _ in alone), rtol=1e-5)
    for path in trained:
        expected = sum(np.asarray(gradients[path]) for _, gradients in alone)
        np.testing.assert_allclose(
            packed[path], expected, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=path
        )
    assert max(np.abs(gradient).max() for gradient in packed.values()) > 0.1
