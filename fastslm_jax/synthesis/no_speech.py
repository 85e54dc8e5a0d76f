"""Sounds without speech: a quiet room, noise, telephone tones, and simple music.

Signals are float64 arrays [samples] at 16 kHz in [-1, 1].
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.synthesis.augment import white_or_pink_noise

SECONDS = (1.0, 8.0)  # range of the length
_FADE = 0.005  # seconds at both ends of a tone
# Telephone tones of North America: frequencies in Hz, seconds on and off.
_TONES = {
    "dial": ((350, 440), 1.0, 0.0),
    "ringing": ((440, 480), 2.0, 4.0),
    "busy": ((480, 620), 0.5, 0.5),
    "reorder": ((480, 620), 0.25, 0.25),
}
_DTMF_ROWS, _DTMF_COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477, 1633)
_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))  # semitones
_CHORDS = ((0, 4, 7), (0, 3, 7), (0, 4, 7, 11), (0, 3, 7, 10), (0, 5, 7))


def _gain(decibels: float) -> float:
    return 10.0 ** (decibels / 20)


def tone(frequencies: Sequence[float], seconds: float) -> np.ndarray:
    """A sum of sines with a peak of at most 1, faded in and out."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    sines = sum(np.sin(2 * np.pi * frequency * time) for frequency in frequencies)
    fade = np.clip(np.minimum(time, time[-1:] - time) / _FADE, 0.0, 1.0)
    return fade * sines / len(frequencies)


def _silence(length: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """A quiet room: noise of -60 to -45 dBFS."""
    return _gain(rng.uniform(-60, -45)) * white_or_pink_noise(length, rng.random() < 0.7, noise)


def _noise(length: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Noise of -40 to -15 dBFS, of which half comes in slow waves."""
    signal = white_or_pink_noise(length, rng.random() < 0.5, noise)
    if rng.random() < 0.5:
        phase = rng.uniform(0.3, 3.0) * np.arange(length) / SAMPLE_RATE + rng.random()
        signal = signal * (0.55 + 0.45 * np.sin(2 * np.pi * phase))
    return _gain(rng.uniform(-40, -15)) * signal


def _beeps(rng: random.Random) -> list[tuple[np.ndarray, float]]:
    """(tone, seconds of silence after it): beeps, keys of a telephone, or one of _TONES."""
    kind = rng.choice(["beeps", "keys", *_TONES])
    if kind == "beeps":
        frequency, on, off = rng.uniform(300, 2500), rng.uniform(0.08, 0.8), rng.uniform(0.1, 1.5)
        return [(tone([frequency], on), off)]
    if kind == "keys":
        on, off = rng.uniform(0.05, 0.25), rng.uniform(0.05, 0.4)
        keys = [
            (rng.choice(_DTMF_ROWS), rng.choice(_DTMF_COLUMNS)) for _ in range(rng.randint(1, 11))
        ]
        return [(tone(key, on), off) for key in keys]
    frequencies, on, off = _TONES[kind]
    return [(tone(frequencies, on if off else SECONDS[1]), off)]


def _tones(length: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Telephone tones with a peak of -25 to -3 dBFS in a quiet room."""
    signal, at = np.zeros(length), round(rng.uniform(0.0, 0.5) * SAMPLE_RATE)
    beeps = _beeps(rng)
    is_repeated = rng.random() < 0.7
    while at < length:
        for beep, off in beeps:
            part = signal[at : at + len(beep)]
            part += beep[: len(part)]
            at += len(beep) + round(off * SAMPLE_RATE)
        if not is_repeated:
            break
    return _gain(rng.uniform(-25, -3)) * signal + _silence(length, rng, noise)


def _music(length: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Chords and single notes of one scale, as a plucked or held instrument plays them."""
    signal, at = np.zeros(length), 0
    beat, root = rng.uniform(0.15, 0.6), rng.uniform(110.0, 330.0)
    decay, harmonics = rng.uniform(0.1, 1.5), rng.randint(1, 6)
    scale, is_melody = rng.choice(_SCALES), rng.random() < 0.5
    while at < length:
        degree = rng.choice(scale) + 12 * rng.randint(0, 1)
        notes = (0,) if is_melody and rng.random() < 0.7 else rng.choice(_CHORDS)
        count = round(min(4 * decay, 3.0) * SAMPLE_RATE)
        time = np.arange(min(count, length - at)) / SAMPLE_RATE
        for note in notes:
            frequency = root * 2.0 ** ((degree + note) / 12)
            for harmonic in range(1, harmonics + 1):
                sine = np.sin(2 * np.pi * harmonic * frequency * time) / harmonic**1.5
                signal[at : at + len(time)] += sine * np.exp(-time / decay)
        at += round(beat * rng.choice((1, 1, 2, 4)) * SAMPLE_RATE)
    signal *= _gain(rng.uniform(-25, -3)) / np.abs(signal).max()
    return signal + _silence(length, rng, noise)


KINDS: dict[str, Callable[[int, random.Random, np.random.Generator], np.ndarray]] = {
    "silence": _silence,
    "noise": _noise,
    "tones": _tones,
    "music": _music,
}


def draw(kind: str, rng: random.Random) -> np.ndarray:
    """A sound of one of `KINDS` and of 1 to 8 s; shorter ones are as frequent as longer ones."""
    seconds = math.exp(rng.uniform(*map(math.log, SECONDS)))
    noise = np.random.default_rng(rng.getrandbits(64))
    signal = KINDS[kind](round(seconds * SAMPLE_RATE), rng, noise)
    return np.clip(signal, -1.0, 1.0)
