"""Cuts long recordings at silence."""

import numpy as np

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.errors import UserError

SEARCH = 6 * SAMPLE_RATE  # samples before a segment's limit that are searched for silence
SILENCE = 3 * SAMPLE_RATE // 10  # samples of a silence: longer than a stop consonant
MIN_PIECE = 2 * SAMPLE_RATE  # samples; pieces shorter than two of these are not split


def _quietest(samples: np.ndarray, low: int, high: int) -> int:
    """The center of the quietest SILENCE samples in [low, high); the latest one of ties."""
    step = SILENCE // 12
    count = (high - low) // step
    if count < 24:
        return high
    blocks = samples[low : low + count * step].astype(np.float64).reshape(count, step)
    energy = np.square(blocks).sum(axis=1)
    loudness = np.convolve(energy, np.ones(12), mode="valid")
    last = len(loudness) - 1 - int(np.argmin(loudness[::-1]))
    return low + last * step + SILENCE // 2


def cut(samples: np.ndarray, length: int, window: int) -> list[tuple[int, int]]:
    """Segments (start, stop) that cover all samples, each of at most `length` samples.

    Each ends at the quietest point of its last 6 s, or of its last half if that is shorter. A
    length above the encoder's window is rounded down to whole windows, to avoid padding.

    Example: 70 s with segments of 30 s → cuts 24 to 30 s apart.

    Raises:
        UserError: `length` is shorter than both the window and 1 s.
    """
    if length < window and length < SAMPLE_RATE:
        raise UserError(f"--span={length / SAMPLE_RATE:g}: segments need at least 1 s")
    if length >= window:
        length = length // window * window
    segments, start = [], 0
    while len(samples) - start > length:
        limit = start + length
        stop = _quietest(samples, limit - min(SEARCH, length // 2), limit)
        segments.append((start, stop))
        start = stop
    return [*segments, (start, len(samples))]


def halves(samples: np.ndarray) -> list[tuple[int, int]]:
    """Two pieces, cut at silence in the middle third; one if they would be too short."""
    if len(samples) < 2 * MIN_PIECE:
        return [(0, len(samples))]
    middle = _quietest(samples, len(samples) // 3, 2 * len(samples) // 3)
    return [(0, middle), (middle, len(samples))]
