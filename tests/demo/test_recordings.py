"""Audio of single recordings, and when their words are spoken."""

import itertools

import numpy as np
import pytest

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.demo import examples, recordings
from fastslm_jax.synthesis.augment import Augmentation


def test_word_times_cover_the_recording_in_order():
    recording = recordings.SyntheticRecording(0, "train", "asr", 3)
    times, seconds = (
        recordings.word_times(recording),
        len(recordings.render(recording)) / SAMPLE_RATE,
    )
    text = examples.draw_example("asr", recording.rng(), "train").text
    assert [word for word, _, _ in times] == text.split()
    assert all(start < end for _, start, end in times)
    assert all(
        end == pytest.approx(start) for (_, _, end), (_, start, _) in itertools.pairwise(times)
    )
    assert (times[0][1] < 0.2, times[-1][2]) == (True, pytest.approx(seconds))


def test_word_times_follow_word_lengths_and_include_hesitations():
    """A long word lasts longer than a short one, and a hesitation has its own time."""
    recording = recordings.SyntheticRecording(
        0, "train", "asr", 5, Augmentation(hesitation=1.0, pause=0.0)
    )
    times = recordings.word_times(recording)
    spoken = examples.draw_example("asr", recording.rng(), "train").text.split()
    assert len(times) == len(spoken) + 1
    assert [word for word, _, _ in times if word not in ("um", "uh")] == spoken
    lengths = np.array([len(word) for word, _, _ in times])
    seconds = np.array([end - start for _, start, end in times])
    assert np.corrcoef(lengths, seconds)[0, 1] > 0.3
