"""Sampling against the logits processors of `transformers`, and its seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.inference import sampling
from fastslm_jax.inference.sampling import SamplingParams

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 97)).astype(np.float32)
SEEN = np.random.default_rng(1).integers(0, 97, (4, 12))


def theirs(processor, logits=LOGITS):
    torch = pytest.importorskip("torch")
    return processor(torch.from_numpy(SEEN), torch.from_numpy(logits.copy())).numpy()


def seen_mask():
    mask = np.zeros(LOGITS.shape, bool)
    mask[np.arange(4)[:, None], SEEN] = True
    return mask


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    ours = sampling.penalize_repetition(LOGITS, seen_mask(), penalty)
    np.testing.assert_allclose(ours, theirs(RepetitionPenaltyLogitsProcessor(penalty)), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 97, 500])
def test_top_k(k):
    from transformers import TopKLogitsWarper

    np.testing.assert_array_equal(sampling.keep_top_k(LOGITS, k), theirs(TopKLogitsWarper(k)))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.95])
def test_top_p(p):
    from transformers import TopPLogitsWarper

    ours = np.asarray(sampling.keep_top_p(LOGITS, p))
    np.testing.assert_array_equal(ours, theirs(TopPLogitsWarper(p)))
    assert (np.isfinite(ours).sum(axis=1) >= 1).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature(temperature):
    from transformers import TemperatureLogitsWarper

    ours = sampling.warp(LOGITS, SamplingParams(temperature=temperature).controls())
    np.testing.assert_allclose(ours, theirs(TemperatureLogitsWarper(temperature)), rtol=1e-6)


def test_temperature_top_k_and_top_p_in_order():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    expected = theirs(
        TopPLogitsWarper(0.9), theirs(TopKLogitsWarper(20), theirs(TemperatureLogitsWarper(0.7)))
    )
    controls = SamplingParams(temperature=0.7, top_k=20, top_p=0.9).controls()
    np.testing.assert_allclose(sampling.warp(LOGITS, controls), expected, rtol=1e-6)
    kept = np.isfinite(expected)
    drawn = np.asarray(choices(controls, LOGITS, np.arange(4)))
    for row in range(4):
        assert set(drawn[:, row]) <= set(np.flatnonzero(kept[row]))
        best = np.argmax(LOGITS[row])
        chance = np.exp(expected[row, best]) / np.exp(expected[row, kept[row]]).sum()
        assert (
            abs(np.mean(drawn[:, row] == best) - chance)
            < 4 * np.sqrt(chance * (1 - chance) / 300) + 1e-6
        )


@jax.jit
def choices(controls, logits, streams):
    """The first 300 tokens of each row: [300, rows]."""
    return jax.lax.map(
        lambda count: sampling.choose(
            logits, None, controls, streams, jnp.full(len(streams), count), greedy=False
        ),
        jnp.arange(300),
    )


def test_defaults_change_nothing():
    np.testing.assert_array_equal(sampling.keep_top_k(LOGITS, 0), LOGITS)
    np.testing.assert_array_equal(sampling.keep_top_p(LOGITS, 1.0), LOGITS)
    greedy = sampling.choose(
        LOGITS, None, SamplingParams().controls(), np.arange(4), np.zeros(4, int), greedy=True
    )
    np.testing.assert_array_equal(greedy, LOGITS.argmax(axis=1))


def test_draws_depend_on_request_and_seed_only():
    warm, other = (
        SamplingParams(temperature=2.0, seed=5).controls(),
        SamplingParams(temperature=2.0, seed=6).controls(),
    )
    both = np.asarray(choices(warm, LOGITS, np.arange(4)))
    np.testing.assert_array_equal(both[:, 2:3], choices(warm, LOGITS[2:3], np.arange(2, 3)))
    assert (both != np.asarray(choices(other, LOGITS, np.arange(4)))).any()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"repetition_penalty": 0}]
)
def test_impossible_values(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"--{name}={value}: must be "):
        SamplingParams(**wrong)
