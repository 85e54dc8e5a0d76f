"""Sounds without speech: length, level and frequencies."""

import random

import numpy as np
import pytest

from fastslm_jax.synthesis import no_speech


@pytest.mark.parametrize("kind", no_speech.KINDS)
def test_sounds_have_their_length_and_are_never_digital_silence(kind):
    lengths = set()
    for seed in range(12):
        sound = no_speech.draw(kind, random.Random(seed))
        assert 16_000 <= len(sound) <= 8 * 16_000
        assert 10 / 32768 < np.abs(sound).max() <= 1
        np.testing.assert_array_equal(sound, no_speech.draw(kind, random.Random(seed)))
        lengths.add(len(sound))
    assert len(lengths) == 12


def test_a_quiet_room_is_quiet_and_noise_is_louder():
    def level(kind: str) -> np.ndarray:
        sounds = [no_speech.draw(kind, random.Random(seed)) for seed in range(20)]
        return np.array([10 * np.log10(np.mean(sound**2)) for sound in sounds])

    assert level("silence").min() > -61
    assert level("silence").max() < -44
    assert level("noise").min() > -46  # waves take up to 4.4 dB
    assert level("noise").max() < -12  # peaks are clipped
    assert level("music").max() > level("silence").max()


def test_tones_have_the_frequencies_of_the_telephone_network():
    """Of 200 draws, some are dial tones: 350 and 440 Hz are then their strongest frequencies."""
    pairs = set()
    for seed in range(200):
        sound = no_speech.draw("tones", random.Random(seed))
        spectrum = np.abs(np.fft.rfft(sound, 32_000))  # bins of 0.5 Hz
        first = int(spectrum.argmax())
        spectrum[max(0, first - 20) : first + 20] = 0
        pairs.add(tuple(sorted((round(first / 20) * 10, round(int(spectrum.argmax()) / 20) * 10))))
    assert {(350, 440), (440, 480), (480, 620)} <= pairs
