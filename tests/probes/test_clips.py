"""Clips: reproducible, of one length, disjoint in speakers, with the prosody of their label."""

import itertools

import numpy as np
import pytest

from fastslm_jax.demo import voices
from fastslm_jax.probes import clips
from fastslm_jax.probes.clips import Prosody

pytest.importorskip("espeakng_loader")
LENGTH = 32_000


def draw(target: str, split: str = "train", count: int = 2, seed: int = 0) -> list[clips.Clip]:
    return list(clips.draw(target, split, count, LENGTH, seed))


def fundamental(samples: np.ndarray) -> float:
    """Median pitch in Hz of frames of 64 ms, by autocorrelation between 60 and 400 Hz."""
    frames = samples[: len(samples) // 1024 * 1024].reshape(-1, 1024).astype(float)
    loud = frames[np.abs(frames).max(axis=1) > 0.3 * np.abs(samples).max()]
    spectrum = np.abs(np.fft.rfft(loud, 2048)) ** 2
    lags = np.fft.irfft(spectrum)[:, 40:267].argmax(axis=1) + 40
    return float(np.median(16_000 / lags))


@pytest.mark.parametrize("target", clips.TARGETS)
def test_clips_are_reproducible_and_fill_the_window(target):
    first, again, other = draw(target), draw(target), draw(target, seed=1)
    assert [clip.label for clip in first] == 2 * list(range(len(clips.TARGETS[target])))
    for clip, same, different in zip(first, again, other, strict=True):
        assert clip.samples.shape == (LENGTH,)
        assert clip.samples.dtype == np.int16
        np.testing.assert_array_equal(clip.samples, same.samples)
        assert not np.array_equal(clip.samples, different.samples)


def test_training_and_test_clips_share_no_speaker():
    for split, known in zip(("train", "test"), voices.voices(), strict=True):
        names = sorted({voice.name for voice in known})
        assert [clip.group for clip in draw("pitch", split)][::3] == names[:2]


def test_all_speakers_say_the_same_sentences():
    drawn = draw("speaker", count=1)
    assert {clip.group for clip in drawn} == {"0"}
    assert [clip.group for clip in draw("speaker", count=3)][::12] == ["0", "1", "2"]


def test_the_pitch_classes_differ_in_pitch():
    low, middle, high = (
        np.median([fundamental(c.samples) for c in draw("pitch", count=12) if c.label == label])
        for label in range(3)
    )
    assert low < 0.85 * middle < 0.85**2 * high


def test_a_prosody_is_drawn_from_its_ranges():
    assert Prosody((100, 100), (20, 20), (5, 5)).draw("en+f1", clips.random.Random(0)) == (
        voices.Voice("en+f1", 100, 20, 5)
    )


def test_a_beep_pauses_and_a_tone_does_not():
    drawn = draw("sound", count=8)
    names = tuple(clips.TARGETS["sound"])
    quiet = {
        name: [
            np.mean(np.abs(c.samples).reshape(-1, 400).max(axis=1) < 0.1 * np.abs(c.samples).max())
            for c in drawn
            if names[c.label] == name
        ]
        for name in ("beeps", "tone")
    }
    assert min(quiet["beeps"]) > 0.05 > 0.02 > max(quiet["tone"])


def test_speech_in_a_clip_is_not_repeated():
    """The sentences of a clip differ, and so do those of the next clip."""
    first, second = (clip.samples for clip in itertools.islice(draw("rate", count=2), 0, 4, 3))
    assert not np.array_equal(first[:16_000], second[:16_000])
