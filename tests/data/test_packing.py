"""Packing: rows that are never overfull, arrays to the number, and a model that does not notice that it was packed."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fastslm_jax import config as config_lib
from fastslm_jax.audio import CONTEXT, WindowSpec
from fastslm_jax.data.packing import PackingError, RowShape, Size, assemble, pack
from fastslm_jax.data.prompts import Encoded
from fastslm_jax.training import optim
from fastslm_jax.training import step as steps

# ------------------------------------------------------------------------------------------------------------------- plan


def windows(*counts: int) -> list[Size]:
    return [Size(count, 1, 1) for count in counts]


def test_an_example_goes_to_the_fullest_row_that_takes_it():
    shape = RowShape(windows=4, tokens=100, labels=100)
    assert pack(windows(3, 2, 1), shape) == [[0, 2], [1]]
    assert pack(windows(3, 2, 1, 2, 4), shape) == [[0, 2], [1, 3], [4]]


@pytest.mark.parametrize(
    "shape", [RowShape(8, 10_000, 10_000), RowShape(100, 300, 10_000), RowShape(100, 10_000, 120)]
)
def test_no_row_is_overfull_whatever_runs_out_first(shape):
    rng = np.random.default_rng(0)
    sizes = [
        Size(int(w), int(t), int(n))
        for w, t, n in zip(*(rng.integers(1, high, 500) for high in (9, 120, 50)), strict=True)
    ]
    rows = pack(sizes, shape, open_rows=16)
    assert sorted(number for row in rows for number in row) == list(range(500))
    for row in rows:
        total = Size(
            *(
                sum(getattr(sizes[number], name) for number in row)
                for name in ("windows", "tokens", "labels")
            )
        )
        assert total.fits(shape)


def test_rows_are_nearly_full():
    sizes = windows(*np.random.default_rng(0).integers(1, 9, 2000))
    rows = pack(sizes, RowShape(16, 10_000, 10_000))
    assert sum(size.windows for size in sizes) / (16 * len(rows)) > 0.99


def test_an_example_stays_near_its_place():
    """With two rows open at most, the fullest is given up when a third opens."""
    sizes, shape = windows(3, 2, 3, 1), RowShape(4, 100, 100)
    assert pack(sizes, shape) == [[0, 3], [1], [2]]
    assert pack(sizes, shape, open_rows=2) == [[0], [1], [2, 3]]


def test_sizes_may_be_an_array():
    sizes = windows(3, 2, 1, 2, 4)
    array = np.array([(size.windows, size.tokens, size.labels) for size in sizes])
    assert pack(array, RowShape(4, 100, 100)) == pack(sizes, RowShape(4, 100, 100))


def test_an_example_larger_than_a_row_is_an_error():
    message = "example 1 takes 5 windows, 60 tokens and 7 labels; a row has 4, 100 and 50"
    with pytest.raises(PackingError, match=message):
        pack([Size(1, 1, 1), Size(5, 60, 7)], RowShape(4, 100, 50))


# ------------------------------------------------------------------------------------------------------------------ arrays


def test_assembled_arrays_to_the_number():
    """Two examples: 2 windows of 2 speech tokens at place 1, and 1 window at place 2, in a row of 4 windows and 16 tokens."""
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
    assert (
        row["audio"][1] == 7
    ).sum() == CONTEXT + 8_000 + CONTEXT  # its own half second, and what lies at both sides
    assert set(row["audio"][2]) == {9}
    assert not row["audio"][3].any()
    types = {name: value.dtype.name for name, value in row.items()}
    assert types == dict.fromkeys(types, "int32") | {
        "audio": "int16",
        "loss_mask": "float32",
        "lora_gate": "float32",
    }


def test_an_example_without_audio_runs_without_lora():
    text = Encoded(np.array([5, 6, 2]), np.array([0, 1, 1], bool), speech_start=-1, num_speech=0)
    row = assemble([(text, None)], RowShape(1, 4, 4), WindowSpec(frames=100), tokens_per_window=2)
    assert row["lora_gate"].tolist() == [0, 0, 0, 0]
    assert row["loss_mask"].tolist() == [1, 1, 0, 0]
    assert row["window_recording"].tolist() == [-1]


# --------------------------------------------------------------------------------------------------- through the whole model


def test_a_packed_row_is_its_examples_one_by_one(model, params, make_part, row_shape):
    """Loss and gradients of three examples in one row are the sums over three rows with one example each."""
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
