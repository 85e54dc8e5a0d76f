"""Signals that tests share."""

import numpy as np

from fastslm_jax import audio

SECOND = audio.SAMPLE_RATE


def speech_like(seconds: float, seed: int = 0, level: float = 0.3) -> np.ndarray:
    """Three tones that swell and fade, over quiet noise: float32 in [-1, 1]."""
    t = np.arange(round(seconds * SECOND)) / SECOND
    rng = np.random.default_rng(seed)
    tones = np.zeros(len(t))
    for frequency, swell in ((220, 3), (700, 5), (2500, 2)):
        tones += np.sin(2 * np.pi * frequency * t + rng.uniform(0, 6)) * (
            1 + np.sin(2 * np.pi * swell * t)
        )
    return (level * (tones / 6 + 1e-3 * rng.standard_normal(len(t)))).astype(np.float32)


def noise_with_pauses(
    seconds: float, pauses: tuple[float, ...] = (), length: float = 0.2
) -> np.ndarray:
    """Noise, int16, with silences of that length around the given seconds."""
    samples = np.random.default_rng(0).normal(0, 3000, round(seconds * SECOND)).astype(np.int16)
    for pause in pauses:
        samples[round((pause - length / 2) * SECOND) : round((pause + length / 2) * SECOND)] = 0
    return samples
