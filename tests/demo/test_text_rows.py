"""Packed text rows: blurred words, chat examples, input errors."""

import random

import numpy as np
import pytest

from fastslm_jax.data import prompts
from fastslm_jax.demo import text_rows

WORDS = [(11, 4), (12, 8), (13, 2)]  # ids and numbers of characters


@pytest.fixture(scope="module")
def tokenizer():
    return prompts.load_tokenizer("assets/demo_llm")


def test_blurred_positions_are_means_of_words_and_silence():
    ids, weights = text_rows.blur(WORDS, 7, random.Random(0))
    assert ids.shape == weights.shape == (10, text_rows.BLUR_WORDS)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    assert set(ids.ravel()) == {7, 11, 12, 13}
    # The first word is in the first position, and the window ends in silence.
    assert ids[0, 0] == 11 or weights[0][ids[0] == 11].sum() > 0.1
    assert set(ids[-1][weights[-1] > 0]) == {7}


def test_a_long_text_is_blurred_over_several_windows():
    ids, weights = text_rows.blur(WORDS * 8, 7, random.Random(0))
    assert len(ids) % 10 == 0
    assert len(ids) >= 20
    words_at = [
        [int(i) for i, w in zip(*position, strict=True) if w > 0 and i != 7]
        for position in zip(ids, weights, strict=True)
    ]
    assert max(len(words) for words in words_at) > 1  # several words per position


def test_only_the_answer_is_predicted_after_blurred_text(tokenizer):
    text = answer = "david will visit the zoo"
    instruction = "Repeat the text."
    clear = text_rows.chat_example(tokenizer, text, instruction, answer, None)
    assert tokenizer.decode(clear.tokens).endswith(
        f"{text}\n{instruction}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    )
    assert (clear.ids[:, 0] == clear.tokens).all()
    assert not clear.noise.any()
    blurred = text_rows.chat_example(tokenizer, text, instruction, answer, random.Random(1))
    predicted = blurred.tokens[blurred.loss > 0]
    assert tokenizer.decode(predicted) == answer + "<|im_end|>"
    assert not set(tokenizer(" visit zoo")["input_ids"]) & set(blurred.tokens[: -len(predicted)])
    assert (blurred.noise > 0).sum() == 10  # one window


def test_input_errors_change_the_inputs_and_not_the_targets(tokenizer):
    text = " ".join(
        f"david met {name} in rome" for name in ("anna", "laura", "emma", "peter", "simon") * 8
    )
    clear, wrong = (
        text_rows.chat_example(tokenizer, text, "Repeat the text.", text, None, rng)
        for rng in (None, random.Random(0))
    )
    np.testing.assert_array_equal(wrong.tokens, clear.tokens)
    np.testing.assert_array_equal(wrong.loss, clear.loss)
    changed = wrong.ids[:, 0] != clear.ids[:, 0]
    assert not changed[clear.loss < 1].any()  # the prompt is unchanged
    answer = clear.ids[clear.loss >= 1, 0]
    assert 0.02 < changed.sum() / len(answer) < 0.15
    assert set(wrong.ids[changed, 0]) <= set(answer)


def test_rows_are_packed_and_reproducible(tokenizer):
    rows = text_rows.text_rows(tokenizer, 0, 3, 160, 4)
    segments, positions, tokens, loss, noise, ids, weights = rows
    assert tokens.shape == segments.shape == noise.shape == (4, 160)
    assert ids.shape == (4, 160, text_rows.BLUR_WORDS)
    for row in range(4):
        starts = np.flatnonzero((positions[row] == 0) & (segments[row] > 0))
        assert len(starts) == segments[row].max() > 1
        assert (np.diff(segments[row][segments[row] > 0]) >= 0).all()
    assert not loss[segments == 0].any()  # padding
    assert not weights[segments == 0][:, 1:].any()
    again = text_rows.text_rows(tokenizer, 0, 3, 160, 4)
    assert all((a == b).all() for a, b in zip(again, rows, strict=True))
