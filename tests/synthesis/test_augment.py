"""Augmentation of synthetic speech."""

import random

import numpy as np
import pytest

from fastslm_jax.synthesis import augment


def test_hesitations_and_pauses_are_inserted_between_words():
    both = augment.Augmentation(hesitation=1.0, pause=1.0)
    for seed in range(20):
        words = augment.insert_hesitations("call anna at five", random.Random(seed), both).split()
        assert [
            word for word in words if word not in ("um", "uh", ",")
        ] == "call anna at five".split()
        assert len(words) == 6
        assert words[0] == "call"
    assert augment.insert_hesitations("call anna", random.Random(0), augment.CLEAN) == "call anna"


@pytest.mark.parametrize("is_pink", [False, True])
def test_noise_has_unit_power(is_pink):
    noise = augment.white_or_pink_noise(100_000, is_pink, np.random.default_rng(0))
    assert np.mean(noise**2) == pytest.approx(1.0, abs=0.05)


def test_reverberation_adds_a_tail_of_the_given_energy_after_five_milliseconds():
    impulse = np.zeros(8000)
    impulse[0] = 1.0
    response = augment.reverberate(impulse, 0.3, 6.0, np.random.default_rng(0))
    assert response[0] == pytest.approx(1.0)
    np.testing.assert_allclose(response[1:80], 0.0, atol=1e-9)
    assert 10 * np.log10(np.sum(response[1:] ** 2)) == pytest.approx(-6.0, abs=0.01)
