"""The demo's bases: what the language model reads and the encoder hears in training, and that both learn."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax import audio
from fastslm_jax.data import prompts
from fastslm_jax.demo import train_bases
from fastslm_jax.training import optim

WORDS = [(11, 4), (12, 8), (13, 2)]  # ids and characters


@pytest.fixture(scope="module")
def tokenizer():
    return prompts.load_tokenizer("assets/demo_llm")


def test_blurred_positions_are_means_of_words_and_silence():
    ids, weights = train_bases.blurred(WORDS, 7, random.Random(0))
    assert ids.shape == weights.shape == (10, train_bases.BLUR_WORDS)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    assert set(ids.ravel()) == {7, 11, 12, 13}
    assert (
        ids[0, 0] == 11 or weights[0][ids[0] == 11].sum() > 0.1
    )  # what is said first stands first,
    assert set(ids[-1][weights[-1] > 0]) == {7}  # and the window ends in silence


def test_a_text_of_more_than_a_window_is_blurred_over_several():
    ids, weights = train_bases.blurred(WORDS * 8, 7, random.Random(0))
    assert len(ids) % 10 == 0
    assert len(ids) >= 20
    heard = [
        [int(i) for i, w in zip(*position, strict=True) if w > 0 and i != 7]
        for position in zip(ids, weights, strict=True)
    ]
    assert max(len(words) for words in heard) > 1  # several words in a position


def test_chat_has_the_answer_alone_to_predict_when_it_is_blurred(tokenizer):
    text, instruction, answer = (
        "david will visit the zoo",
        "Repeat the text.",
        "david will visit the zoo",
    )
    clear = train_bases.chat(tokenizer, text, instruction, answer, None)
    assert tokenizer.decode(clear.tokens).endswith(
        f"{text}\n{instruction}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    )
    assert (clear.ids[:, 0] == clear.tokens).all()
    assert not clear.noise.any()
    blurred = train_bases.chat(tokenizer, text, instruction, answer, random.Random(1))
    predicted = blurred.tokens[blurred.loss > 0]
    assert tokenizer.decode(predicted) == answer + "<|im_end|>"
    assert not set(tokenizer(" visit zoo")["input_ids"]) & set(blurred.tokens[: -len(predicted)])
    assert (blurred.noise > 0).sum() == 10  # one window


def test_slips_change_what_is_read_and_not_what_is_predicted(tokenizer):
    text = " ".join(
        f"david met {name} in rome" for name in ("anna", "laura", "emma", "peter", "simon") * 8
    )
    clear, slipped = (
        train_bases.chat(tokenizer, text, "Repeat the text.", text, None, rng)
        for rng in (None, random.Random(0))
    )
    np.testing.assert_array_equal(slipped.tokens, clear.tokens)
    np.testing.assert_array_equal(slipped.loss, clear.loss)
    changed = slipped.ids[:, 0] != clear.ids[:, 0]
    assert not changed[clear.loss < 1].any()  # the question is read as it is
    answer = clear.ids[clear.loss >= 1, 0]
    assert 0.02 < changed.sum() / len(answer) < 0.15
    assert set(slipped.ids[changed, 0]) <= set(answer)


def test_rows_of_text_are_packed_and_reproducible(tokenizer):
    segments, positions, tokens, loss, noise, ids, weights = train_bases.text_rows(
        tokenizer, 0, 3, 160, 4
    )
    assert tokens.shape == segments.shape == noise.shape == (4, 160)
    assert ids.shape == (4, 160, train_bases.BLUR_WORDS)
    for row in range(4):
        starts = np.flatnonzero((positions[row] == 0) & (segments[row] > 0))
        assert len(starts) == segments[row].max() > 1
        assert (np.diff(segments[row][segments[row] > 0]) >= 0).all()
    assert not loss[segments == 0].any()
    assert not weights[segments == 0][:, 1:].any()
    again = train_bases.text_rows(tokenizer, 0, 3, 160, 4)
    assert all(
        (a == b).all()
        for a, b in zip(
            again, (segments, positions, tokens, loss, noise, ids, weights), strict=True
        )
    )


def test_training_goes_on_where_it_was_killed(tmp_path):
    target = jnp.arange(6.0).reshape(2, 3)

    def loss_fn(params, noise):
        return jnp.sum(jnp.square(params["w"] - target + noise))

    def run(folder, steps):
        optimizer = optim.make_optimizer("adamw", optim.schedule("constant", 0.1, 500, 1))
        leaves, _ = train_bases.train(
            "toy", folder, steps, {"w": jnp.zeros((2, 3))}, loss_fn, optimizer, batch
        )
        return np.asarray(leaves["w"])

    def batch(step):
        return (0.1 * jax.random.normal(jax.random.key(step), (2, 3)),)

    whole = run(tmp_path / "whole", 500)
    run(tmp_path / "halves", 250)
    np.testing.assert_array_equal(run(tmp_path / "halves", 500), whole)
    np.testing.assert_allclose(whole, target, atol=0.2)


def test_streams_hold_recordings_that_run_over_window_borders():
    rng = np.random.default_rng(0)
    clips = [rng.integers(-99, 99, 16_000 * seconds).astype(np.int16) for seconds in (2, 3, 4)]
    spec = audio.WindowSpec(600)
    vocabulary = {"one": 1, "two": 2, "three": 3}
    texts = ["one", "one two", "one two three"]
    spoken = [
        np.repeat([vocabulary[word] for word in text.split()], 50).astype(np.int32)
        for text in texts
    ]  # a second each
    batches = train_bases.StreamBatches(clips, texts, spoken, vocabulary, spec)
    windows, frames, recordings, characters, words, by_frame = batches.draw(
        np.random.default_rng(1)
    )
    assert windows.shape[:2] == frames.shape == recordings.shape == (4, 2)
    assert {tuple(row) for row in recordings.tolist()} == {
        (0, 0),
        (0, 1),
    }  # one stream over both windows, or a clip in each
    assert by_frame.shape == (4, 600)
    for row in range(4):
        text = "".join(train_bases.CHARACTERS[c - 1] for c in characters[row] if c)
        said = [w for w in words[row] if w]
        assert [vocabulary[word] for word in text.split()] == said
        runs = [
            int(w)
            for w, before in zip(by_frame[row], [0, *by_frame[row][:-1]], strict=True)
            if w and w != before
        ]
        assert runs == said
        assert (np.bincount(by_frame[row])[1:] % 50 == 0).all()


def test_clips_of_every_length_make_whole_batches():
    """Clips a few samples longer than a window, and clips of almost two, are drawn like any other."""
    spec = audio.WindowSpec(600)
    clips = [
        np.ones(samples, np.int16) for samples in (1_600, 95_999, 96_100, 96_159, 184_000, 191_900)
    ]
    spoken = [np.ones(-(-len(clip) // 320), np.int32) for clip in clips]
    batches = train_bases.StreamBatches(clips, ["one"] * len(clips), spoken, {"one": 1}, spec)
    for seed in range(100):
        windows, *_, by_frame = batches.draw(np.random.default_rng(seed))
        assert windows.shape == (4, 2, spec.samples + 2 * audio.CONTEXT)
        assert by_frame.shape == (4, 600)
