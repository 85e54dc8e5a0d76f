"""Voices of the synthetic corpus, and their speech."""

import dataclasses
import functools

import numpy as np
import soxr

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.synthesis import espeak
from fastslm_jax.synthesis.espeak import ACCENTS, VARIANTS

WordStarts = list[tuple[int, float]]  # (character index in the text, start in seconds) of words


@dataclasses.dataclass(frozen=True)
class Voice:
    """An espeak-ng voice ("en-us+f3"), its rate (words per minute), pitch (0 to 99), and strength
    of intonation (0 to 100)."""

    name: str
    rate: int
    pitch: int
    pitch_range: int = 50

    @property
    def speaker(self) -> str:
        return f"{self.name}-r{self.rate}-p{self.pitch}"


@functools.cache
def voices() -> tuple[tuple[Voice, ...], tuple[Voice, ...]]:
    """(96 training voices, 12 held-out voices).

    They share no (accent, variant) pair; every variant is held out once.
    """
    train, held_out = [], []
    for a, accent in enumerate(ACCENTS):
        for v, variant in enumerate(VARIANTS):
            is_held_out = a == (3 * v + 1) % len(ACCENTS)
            for take in range(1 if is_held_out else 2):
                k = 5 * a + 7 * v + 4 * take
                voice = Voice(
                    f"{accent}+{variant}",
                    rate=150 + 5 * (k % 10),
                    pitch=(30, 38, 46, 54, 62, 70)[(k + take) % 6],
                )
                (held_out if is_held_out else train).append(voice)
    return tuple(train), tuple(held_out)


def speak(text: str, voice: Voice) -> tuple[np.ndarray, WordStarts]:
    """Speech at 16 kHz (float64 [samples], peak 1), trimmed of silence, and its word starts."""
    samples, rate, words = espeak.synthesize_words(
        text, voice.name, voice.rate, voice.pitch, pitch_range=voice.pitch_range
    )
    speech = soxr.resample(samples / 32768.0, rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
    speech = speech[loud[0] : loud[-1] + 1]
    starts = [(character, sample / rate - loud[0] / SAMPLE_RATE) for character, sample in words]
    return speech / np.abs(speech).max(), starts


def speak_within(text: str, voice: Voice, seconds: float) -> tuple[np.ndarray, WordStarts]:
    """Like `speak`, raising the rate until the speech is no longer than `seconds`."""
    while True:
        speech, starts = speak(text, voice)
        if len(speech) <= seconds * SAMPLE_RATE:
            return speech, starts
        voice = dataclasses.replace(voice, rate=voice.rate + 10)
