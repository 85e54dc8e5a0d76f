"""The joint model: speech tokens of windows, and splicing them into the text embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


def windows_of(model, seconds: float, seed: int = 0):
    samples = np.random.default_rng(seed).normal(0, 3000, round(16_000 * seconds)).astype(np.int16)
    windows, frames = model.window.cut(samples)
    return windows[None], frames[None], np.zeros((1, len(windows)), np.int32)


def test_parameters_have_three_parts(params):
    assert set(params) == {"encoder", "hfq_former", "llm"}


def test_window_length_and_tokens_per_window(model):
    assert model.window.seconds == 1.0
    assert model.tokens_per_window == 3


def test_window_groups_match_all_windows_at_once(model, params):
    audio = windows_of(model, 4.0)
    speech = jax.jit(model.speech_tokens)(params, *audio)
    assert speech.shape == (1, 12, 32)
    for remat in ("none", "full"):
        grouped = dataclasses.replace(model, window_batch=2, llm=model.llm.clone(remat=remat))
        np.testing.assert_allclose(
            jax.jit(grouped.speech_tokens)(params, *audio), speech, atol=1e-5
        )


def test_speech_tokens_are_in_temporal_order(model, params):
    mel = np.random.default_rng(0).normal(0, 0.5, (1, 3, 100, 16)).astype(np.float32)
    tokens_of = jax.jit(model.speech_tokens_from_mel)
    tokens = tokens_of(params, mel).reshape(3, 3, 32)  # window, token, width
    swapped = tokens_of(params, mel[:, [1, 0, 2]]).reshape(3, 3, 32)
    np.testing.assert_allclose(swapped[np.array([1, 0, 2])], tokens, atol=1e-5)
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-3


def test_splice_follows_the_speech_slots(model, params):
    speech = jnp.arange(2 * 4 * 32, dtype=jnp.float32).reshape(2, 4, 32)
    tokens = jnp.array([[7, 0, 0, 9], [1, 2, 0, 3]])
    slots = jnp.array([[-1, 2, 3, -1], [-1, -1, 0, -1]])
    spliced = model.splice(params, tokens, slots, speech)
    table = params["llm"]["embed_tokens"]
    expected = [
        [table[7], speech[0, 2], speech[0, 3], table[9]],
        [table[1], table[2], speech[1, 0], table[3]],
    ]
    np.testing.assert_array_equal(spliced, np.array(expected))
    np.testing.assert_array_equal(model.splice(params, tokens, slots, None), table[tokens])
