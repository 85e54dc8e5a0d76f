"""Log-mel against `WhisperFeatureExtractor`, in both padding modes."""

import functools

import jax
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from fastslm_jax import audio
from fastslm_jax.models import log_mel

SECONDS = (0.3, 1.0, 29.99, 30.0, 30.01, 95.0)
TOLERANCE = 1e-4


@functools.cache
def recording(seconds: float) -> np.ndarray:
    """Harmonics of a varying pitch and loudness, plus noise 50 dB below: float32 in [-1, 1]."""
    t = np.arange(round(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(140 + 40 * np.sin(2 * np.pi * 0.7 * t)) / audio.SAMPLE_RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 20)) * np.clip(
        np.sin(2 * np.pi * 1.3 * t), 0, None
    )
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.2 * voice + 0.001 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def extractor():
    return WhisperFeatureExtractor(feature_size=128)


def windows_of(samples: np.ndarray, padding: str) -> np.ndarray:
    """Log-mel of a recording with its windows joined: [frames, 128]."""
    windows, frames = audio.WindowSpec(padding=padding).cut(samples)
    mel = jax.jit(log_mel.log_mel, static_argnums=3)(
        windows[None], frames[None], np.zeros((1, len(windows)), np.int32), 128
    )
    return np.asarray(mel).reshape(-1, 128)


@pytest.mark.parametrize("seconds", SECONDS)
def test_whisper_padding(seconds, extractor):
    samples = recording(seconds)
    ours = windows_of(samples, "whisper")
    count = -(-len(samples) // 480_000)
    assert ours.shape[0] == count * 3000
    theirs = extractor(
        samples,
        sampling_rate=16_000,
        padding="max_length",
        max_length=count * 480_000,
        truncation=False,
    )
    np.testing.assert_allclose(ours.T, theirs["input_features"][0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seconds", SECONDS)
def test_released_padding(seconds, extractor):
    """Features of the recording without padding (at least one second), then zeros."""
    samples = recording(seconds)
    ours = windows_of(samples, "released")
    samples = np.pad(samples, (0, max(0, audio.MIN_SAMPLES - len(samples))))
    theirs = extractor(samples, sampling_rate=16_000, padding="do_not_pad", truncation=False)[
        "input_features"
    ][0]
    frames = len(samples) // 160
    assert theirs.shape == (128, frames)
    np.testing.assert_allclose(ours[:frames].T, theirs, atol=TOLERANCE, rtol=0)
    assert not ours[frames:].any()
    assert len(ours) % 3000 == 0
