"""Augmentation of synthetic speech."""

import random

import numpy as np
import pytest
import scipy.signal

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


def sine(frequency: float, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * 16_000)) / 16_000)


def power_db(signal: np.ndarray) -> float:
    """Relative to a sine of amplitude 0.5; without the ends, where filters settle."""
    return 10 * np.log10(max(1e-12, np.mean(signal[2000:-2000] ** 2) / 0.125))


@pytest.mark.parametrize(
    ("frequency", "low", "high"),
    [(1000, -0.2, 0.2), (150, -80, -20), (3700, -80, -6), (5000, -200, -50)],
)
def test_the_telephone_band_is_300_to_3400_hz(frequency, low, high):
    heard = augment.telephone(sine(frequency))
    assert len(heard) == 16_000
    assert low <= power_db(heard) <= high


def test_mu_law_has_255_levels_with_a_constant_relative_error():
    signal = np.linspace(-1, 1, 100_001)
    quantized = augment.mu_law(signal)
    assert len(np.unique(quantized)) == 255
    assert quantized[[0, 50_000, -1]] == pytest.approx([-1, 0, 1])
    loud = np.abs(signal) > 0.05
    assert np.abs(quantized[loud] / signal[loud] - 1).max() < 0.03
    np.testing.assert_allclose(augment.mu_law(quantized), quantized, atol=1e-12)
    assert augment.mu_law(np.array([1.5])) == pytest.approx(1)


def test_a_faster_signal_is_shorter_and_higher():
    fast = augment.change_speed(sine(1000), 1.1)
    assert len(fast) == round(16_000 / 1.1)
    spectrum = np.abs(np.fft.rfft(fast))
    assert spectrum.argmax() * 16_000 / len(fast) == pytest.approx(1100, abs=2)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_pitch_is_changed_without_the_formants(factor):
    """A pulse train of 100 Hz through a resonance at 1500 Hz."""
    pulses = np.zeros(16_000)
    pulses[::160] = 1.0
    radius, angle = 0.97, 2 * np.pi * 1500 / 16_000
    voice = scipy.signal.lfilter([1.0], [1.0, -2 * radius * np.cos(angle), radius**2], pulses)
    changed = augment.change_pitch(voice, factor, 16_000)
    assert len(changed) == round(16_000 / factor)
    power = np.abs(np.fft.rfft(changed * np.hanning(len(changed)))) ** 2
    frequency = np.arange(len(power)) * 16_000 / len(changed)
    near = (frequency > 700) & (frequency < 2500)
    center = np.sum(frequency[near] * power[near]) / np.sum(power[near])
    assert center == pytest.approx(1500, rel=0.05)  # moved by the factor without the correction
    spacing = np.fft.irfft(power)[60:400].argmax() + 60  # of the autocorrelation, in samples
    assert len(changed) / (2 * (len(power) - 1)) * 16_000 / spacing == pytest.approx(
        100 * factor, rel=0.02
    )


def test_a_channel_sets_the_peak_and_depends_on_the_generator_only():
    nothing = augment.Channel(0.0, 0.0, 0.0, 0.0)
    sent = augment.send(sine(1000), random.Random(0), nothing, peak_db=-20.0)
    assert (sent.dtype, np.abs(sent).max()) == (np.int16, pytest.approx(3277, abs=1))
    as_it_is = augment.send(sine(1000), random.Random(0), nothing, peak_db=None)
    assert np.abs(as_it_is).max() == pytest.approx(16_384, abs=1)
    everything = augment.Channel(1.0, 1.0, 1.0, 1.0)
    one, same, other = (
        augment.send(sine(1000), random.Random(seed), everything, -3.0) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert 16_000 / 1.1 - 1 <= len(one) <= 16_000 / 0.9 + 1
    assert len(one) != len(other)
