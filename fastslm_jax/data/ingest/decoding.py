"""Decoding for an import: any file to int16 samples at 16 kHz, and a name for everything that can be wrong with it."""

import io
import os
import pathlib

import numpy as np
import soundfile

from fastslm_jax import audio
from fastslm_jax.audio import SAMPLE_RATE

CONTAINERS = (
    ".m4a",
    ".mp4",
    ".webm",
    ".aac",
    ".mov",
    ".mkv",
)  # what libsndfile does not read and PyAV does
KINDS = (
    "broken_json", "bad_field", "outside_root", "missing_file", "unreadable", "truncated", "zero_length", "not_finite", "silent",
    "duration_mismatch", "empty_text", "text_rate", "duplicate_id",
)  # fmt: skip


class Rejected(Exception):  # noqa: N818 (it is not an error of the program: the import goes on)
    """A clip that cannot be used: its kind, one of KINDS, and the reason for people."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def _decode_container(source: str | io.BytesIO) -> tuple[np.ndarray, int]:
    try:
        import av
    except ImportError:
        raise Rejected(
            "unreadable",
            "needs PyAV (pip install fastslm-jax[containers]), or convert it to wav or flac",
        ) from None
    try:
        with av.open(source) as file:
            if not file.streams.audio:
                raise Rejected("unreadable", "holds no audio stream")
            rate, resampler = (
                file.streams.audio[0].rate,
                av.AudioResampler(format="fltp", layout="mono"),
            )
            frames = [
                out for frame in file.decode(audio=0) for out in resampler.resample(frame)
            ] + resampler.resample(None)
    except (av.FFmpegError, ValueError) as error:
        raise Rejected("unreadable", f"not readable as audio ({error})") from None
    return np.concatenate(
        [frame.to_ndarray()[0] for frame in frames] or [np.zeros(0, np.float32)]
    ), rate


def _decode_file(
    source: str | io.BytesIO, offset: float, seconds: float
) -> tuple[np.ndarray, int, float]:
    """float32 mono samples from `offset` on, their rate, and the length of the whole file in seconds."""
    try:
        with soundfile.SoundFile(source) as file:
            rate, total = file.samplerate, file.frames
            start = min(round(offset * rate), total)
            count = total - start if not seconds else min(round(seconds * rate), total - start)
            file.seek(start)
            samples = file.read(count, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        text = str(error)
        kind = (
            "truncated"
            if "lost sync" in text or "Unspecified internal error" in text
            else "unreadable"
        )
        raise Rejected(kind, f"not readable as audio ({text})") from None
    if len(samples) < count:
        raise Rejected(
            "truncated",
            f"its header announces {total / rate:.2f} s, it ends at {(start + len(samples)) / rate:.2f} s",
        )
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1), rate, total / rate


def decode(
    source: str | bytes, offset: float, seconds: float, *, whole: bool, tolerance: float
) -> np.ndarray:
    """int16 samples [n] at 16 kHz of a file, or of a file's bytes.

    Args:
        offset, seconds: the part to take; 0 seconds: to the end.
        whole: the part is said to be the whole file.
        tolerance: seconds by which the file may be shorter than the part, or differ from it if it is the whole.

    Raises:
        Rejected: it cannot be used.
    """
    is_path = isinstance(source, str)
    if is_path and not os.path.isfile(source):
        raise Rejected("missing_file", "no such audio file")
    if (os.path.getsize(source) if is_path else len(source)) == 0:
        raise Rejected("zero_length", "the file is empty")
    if is_path and pathlib.Path(source).suffix.lower() in CONTAINERS:
        samples, rate = _decode_container(source)
        length, start = len(samples) / rate, round(offset * rate)
        samples = samples[start : start + round(seconds * rate)] if seconds else samples[start:]
    else:
        if is_path and (missing := audio.riff_shortfall(source)):
            raise Rejected("truncated", missing)
        samples, rate, length = _decode_file(
            source if is_path else io.BytesIO(source), offset, seconds
        )
    if length == 0:
        raise Rejected("zero_length", "the file holds no samples")
    if seconds and (
        offset + seconds > length + tolerance or (whole and abs(length - seconds) > tolerance)
    ):
        part = f"{seconds:.2f} s" if not offset else f"{offset:.2f} s to {offset + seconds:.2f} s"
        raise Rejected("duration_mismatch", f"the file holds {length:.2f} s, its line says {part}")
    return from_float(samples, rate)


def from_float(samples: np.ndarray, rate: int) -> np.ndarray:
    """Mono float samples [n] in [-1, 1] at any rate → int16 at 16 kHz.

    Raises:
        Rejected: nothing is to be heard in them.
    """
    if not len(samples):
        raise Rejected("zero_length", "holds no samples")
    if not np.isfinite(samples).all():
        raise Rejected("not_finite", "holds samples that are not numbers")
    samples = audio.to_int16(audio.resample(samples, rate))
    if not samples.any():
        raise Rejected("silent", f"all {len(samples) / SAMPLE_RATE:.2f} s are digital silence")
    return samples
