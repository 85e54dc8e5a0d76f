"""Labeled speech batches for the encoder."""

import numpy as np

from fastslm_jax import audio
from fastslm_jax.demo.speech_batches import CHARACTERS, Clips, StreamBatches


def test_labels_follow_recordings_across_window_borders():
    rng = np.random.default_rng(0)
    clips = [rng.integers(-99, 99, 16_000 * seconds).astype(np.int16) for seconds in (2, 3, 4)]
    spec = audio.WindowSpec(600)
    vocabulary = {"one": 1, "two": 2, "three": 3}
    texts = ["one", "one two", "one two three"]
    spoken = [  # a second per word
        np.repeat([vocabulary[word] for word in text.split()], 50).astype(np.int32)
        for text in texts
    ]
    batches = StreamBatches(Clips(clips, texts, spoken), vocabulary, spec)
    drawn = batches.draw(np.random.default_rng(1))
    windows, frames, recordings, characters, words, by_feature = drawn
    assert windows.shape[:2] == frames.shape == recordings.shape == (4, 2)
    # One stream over both windows, or a clip in each.
    assert {tuple(row) for row in recordings.tolist()} == {(0, 0), (0, 1)}
    assert by_feature.shape == (4, 600)
    for row in range(4):
        text = "".join(CHARACTERS[c - 1] for c in characters[row] if c)
        labels = [w for w in words[row] if w]
        assert [vocabulary[word] for word in text.split()] == labels
        runs = [
            int(w)
            for w, before in zip(by_feature[row], [0, *by_feature[row][:-1]], strict=True)
            if w and w != before
        ]
        assert runs == labels
        assert (np.bincount(by_feature[row])[1:] % 50 == 0).all()


def test_clips_of_every_length_make_whole_batches():
    """Clips just longer than a window, and clips of almost two, are drawn like any other."""
    spec = audio.WindowSpec(600)
    clips = [
        np.ones(samples, np.int16) for samples in (1_600, 95_999, 96_100, 96_159, 184_000, 191_900)
    ]
    spoken = [np.ones(-(-len(clip) // 320), np.int32) for clip in clips]
    batches = StreamBatches(Clips(clips, ["one"] * len(clips), spoken), {"one": 1}, spec)
    for seed in range(100):
        windows, *_, by_feature = batches.draw(np.random.default_rng(seed))
        assert windows.shape == (4, 2, spec.samples + 2 * audio.CONTEXT)
        assert by_feature.shape == (4, 600)
