"""Augmentation of synthetic speech: hesitations, pauses, speed, reverberation, noise, telephone.

Signals are float64 arrays [samples] at 16 kHz.
"""

import dataclasses
import random

import numpy as np
import scipy.interpolate
import scipy.signal
import soxr

from fastslm_jax.audio import SAMPLE_RATE, to_int16


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Probabilities per utterance. Hesitations ("um") are spoken but not transcribed."""

    noise: float = 0.18  # white or pink, 15 to 30 dB below the speech
    reverb: float = 0.15  # an exponentially decaying tail, 0.15 to 0.4 s to -60 dB
    hesitation: float = 0.03
    pause: float = 0.03


CLEAN = Augmentation(0.0, 0.0, 0.0, 0.0)

TELEPHONE_RATE = 8000
TELEPHONE_BAND = (300.0, 3400.0)  # Hz
_HIGHEST_VOICE = 530.0  # Hz: the cepstrum's coefficients below its period are the envelope
_MU = 255.0  # of mu-law, ITU-T G.711


@dataclasses.dataclass(frozen=True)
class Channel:
    """How speech gets from the speaker to the file: probabilities per clip."""

    speed: float = 0.5  # played 0.9 to 1.1 times as fast, which changes the pitch as well
    reverb: float = 0.3
    noise: float = 0.4
    telephone: float = 0.5


def insert_hesitations(text: str, rng: random.Random, augmentation: Augmentation) -> str:
    """ "call anna at five" -> "call um anna at five", or "call anna , at five" with a pause."""
    words = text.split()
    for probability, choices in (
        (augmentation.hesitation, ("uh", "um")),
        (augmentation.pause, (",",)),
    ):
        draw, place, inserted = rng.random(), rng.randrange(1, len(words)), rng.choice(choices)
        if draw < probability:
            words.insert(place, inserted)
    return " ".join(words)


def reverberate(
    signal: np.ndarray, seconds: float, direct_db: float, noise: np.random.Generator
) -> np.ndarray:
    """Convolves the signal with a synthetic room response; the length does not change.

    Args:
        seconds: time in which the tail decays by 60 dB.
        direct_db: energy of the tail in dB below the direct sound.
        noise: source of the tail.
    """
    n = round(seconds * SAMPLE_RATE)
    tail = noise.standard_normal(n) * 10.0 ** (-3.0 * np.arange(n) / n)
    tail[: round(0.005 * SAMPLE_RATE)] = 0.0  # the first reflection is 5 ms after the direct sound
    tail *= 10.0 ** (-direct_db / 20) / np.linalg.norm(tail)
    tail[0] = 1.0
    size = 1 << (len(signal) + n - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(tail, size), size)[: len(signal)]


def white_or_pink_noise(length: int, is_pink: bool, noise: np.random.Generator) -> np.ndarray:
    """White or pink (1/f power) noise of unit power: [length]."""
    size = 1 << (length - 1).bit_length()  # a power of two: the FFT of a prime length is slow
    white = noise.standard_normal(size)
    if not is_pink:
        return white[:length]
    spectrum = np.fft.rfft(white)
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1.0))
    spectrum[0] = 0.0
    pink = np.fft.irfft(spectrum, size)[:length]
    return pink / pink.std()


def augment(signal: np.ndarray, rng: random.Random, augmentation: Augmentation) -> np.ndarray:
    """Adds reverberation and noise, each with its probability."""
    noise = np.random.default_rng(rng.getrandbits(64))
    if rng.random() < augmentation.reverb:
        signal = reverberate(signal, rng.uniform(0.15, 0.4), rng.uniform(3.0, 12.0), noise)
    if rng.random() < augmentation.noise:
        snr_db = rng.uniform(15.0, 30.0)
        level = np.sqrt(np.mean(signal**2)) * 10.0 ** (-snr_db / 20)
        signal = signal + level * white_or_pink_noise(len(signal), rng.random() < 0.5, noise)
    return signal


def change_speed(signal: np.ndarray, factor: float) -> np.ndarray:
    """Plays a signal `factor` times as fast: [n] → [n / factor]. The pitch rises by the factor."""
    return soxr.resample(signal, factor * SAMPLE_RATE, SAMPLE_RATE)


def change_pitch(signal: np.ndarray, factor: float, rate: int) -> np.ndarray:
    """Multiplies the pitch, and keeps formants: [n] → [n / factor], so slow the speech first.

    The played faster signal gets the spectral envelope, the smoothed part of its cepstrum, of the
    original. With a sampling rate above 16 kHz, nothing is missing below 8 kHz.
    """
    faster = soxr.resample(signal, factor * rate, rate)
    size, step = round(0.032 * rate), round(0.008 * rate)
    settings = {"fs": rate, "nperseg": size, "noverlap": size - step}
    _, _, spectrum = scipy.signal.stft(faster, **settings)
    cepstrum = np.fft.irfft(np.log(np.abs(spectrum) + 1e-6), axis=0)
    smooth = round(rate / _HIGHEST_VOICE)
    cepstrum[smooth : 1 - smooth] = 0.0
    envelope = np.fft.rfft(cepstrum, axis=0).real  # of log amplitudes: [frequency, frame]
    bins = np.arange(len(envelope))
    position = np.minimum(factor * bins, 0.95 * bins[-1])  # above, the resampler fades out
    original = scipy.interpolate.interp1d(bins, envelope, axis=0)(position)
    _, changed = scipy.signal.istft(spectrum * np.exp(original - envelope), **settings)
    return changed[: len(faster)]


def mu_law(signal: np.ndarray) -> np.ndarray:
    """Quantizes a signal in [-1, 1] to 8 bits by mu-law."""
    compressed = np.log1p(_MU * np.minimum(np.abs(signal), 1.0)) / np.log1p(_MU)
    levels = np.round(127 * compressed) / 127
    return np.sign(signal) * np.expm1(levels * np.log1p(_MU)) / _MU


def telephone(signal: np.ndarray) -> np.ndarray:
    """A signal in [-1, 1] after a telephone line: 300 to 3400 Hz, 8 kHz, mu-law. [n] → [n]."""
    band = scipy.signal.butter(4, TELEPHONE_BAND, "bandpass", fs=TELEPHONE_RATE, output="sos")
    narrow = scipy.signal.sosfilt(band, soxr.resample(signal, SAMPLE_RATE, TELEPHONE_RATE))
    wide = soxr.resample(mu_law(narrow), TELEPHONE_RATE, SAMPLE_RATE)
    return np.pad(wide, (0, max(0, len(signal) - len(wide))))[: len(signal)]


def send(
    signal: np.ndarray, rng: random.Random, channel: Channel, peak_db: float | None
) -> np.ndarray:
    """A signal after a channel.

    Args:
        signal: [n].
        rng: draws what happens.
        channel: its probabilities.
        peak_db: peak in dBFS before the telephone line (None: as it is).

    Returns:
        int16 samples [m].
    """
    if rng.random() < channel.speed:
        signal = change_speed(signal, rng.uniform(0.9, 1.1))
    signal = augment(signal, rng, Augmentation(channel.noise, channel.reverb))
    if peak_db is not None:
        signal = signal * 10.0 ** (peak_db / 20) / np.abs(signal).max()
    if rng.random() < channel.telephone:
        signal = telephone(signal)
    return to_int16(signal)
