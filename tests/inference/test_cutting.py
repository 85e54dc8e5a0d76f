"""Cuts of long recordings: at silence, without gaps, and never longer than asked for."""

import itertools

import pytest
from signals import SECOND, noise_with_pauses

from fastslm_jax.errors import UserError
from fastslm_jax.inference.cutting import cut, halves


def test_cuts_are_in_the_silence_before_the_limit():
    found = cut(noise_with_pauses(70, pauses=(12, 27.3, 29, 52.2)), 30 * SECOND, 10 * SECOND)
    assert [start for start, _ in found] == [0, found[0][1], found[1][1]]
    assert found[-1][1] == 70 * SECOND
    assert found[0][1] / SECOND == pytest.approx(29, abs=0.1)
    assert 52.2 < found[1][1] / SECOND <= 29.1 + 30
    assert all(stop - start <= 30 * SECOND for start, stop in found)


def test_a_pause_between_sentences_is_silence_and_a_stop_within_a_word_is_not():
    samples = noise_with_pauses(40, pauses=(25.5,), length=0.3)
    samples[round(28.95 * SECOND) : 29 * SECOND] = 0
    assert cut(samples, 30 * SECOND, 10 * SECOND)[0][1] / SECOND == pytest.approx(25.5, abs=0.05)


@pytest.mark.parametrize("seconds", [0.1, 9.99, 10.0, 10.0 + 1 / SECOND, 10.4, 33.3])
@pytest.mark.parametrize("length", [1.5, 10.0, 25.0])
def test_segments_cover_everything_and_fit(seconds, length):
    found = cut(noise_with_pauses(seconds), round(length * SECOND), 10 * SECOND)
    assert found[0][0] == 0
    assert found[-1][1] == round(seconds * SECOND)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
    assert all(0 < stop - start <= length * SECOND for start, stop in found)


def test_halves_meet_in_the_silence_near_the_middle():
    (low, middle), (again, high) = halves(noise_with_pauses(9, pauses=(1, 4, 8)))
    assert (low, again, high) == (0, middle, 9 * SECOND)
    assert middle / SECOND == pytest.approx(4, abs=0.1)
    assert halves(noise_with_pauses(3.9)) == [(0, round(3.9 * SECOND))]


def test_segments_below_a_second_are_rejected():
    with pytest.raises(UserError, match=r"--span=0\.5: segments need at least 1 s"):
        cut(noise_with_pauses(9), SECOND // 2, 10 * SECOND)
