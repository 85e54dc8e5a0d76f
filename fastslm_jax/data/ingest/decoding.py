"""Audio decoding for an import: any file to int16 samples at 16 kHz, or a classified rejection."""

import io
import os
import pathlib

import numpy as np
import soundfile

from fastslm_jax import audio
from fastslm_jax.audio import SAMPLE_RATE

CONTAINERS = (".m4a", ".mp4", ".webm", ".aac", ".mov", ".mkv")  # read by PyAV, not by libsndfile
KINDS = (
    "broken_json",
    "bad_field",
    "outside_root",
    "missing_file",
    "unreadable",
    "truncated",
    "zero_length",
    "not_finite",
    "silent",
    "duration_mismatch",
    "empty_text",
    "text_rate",
    "duplicate_id",
)


class Rejected(Exception):  # noqa: N818 (not an error of the program: the import continues)
    """A clip cannot be used.

    Attributes:
        kind: one of KINDS.
        reason: an explanation for the user.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def _decode_container(path: str) -> tuple[np.ndarray, int]:
    """float32 mono samples of a whole file, and their sample rate."""
    try:
        import av
    except ImportError:
        raise Rejected(
            "unreadable",
            "needs PyAV (pip install fastslm-jax[containers]), or convert it to wav or flac",
        ) from None
    try:
        with av.open(path) as file:
            if not file.streams.audio:
                raise Rejected("unreadable", "the file has no audio stream")
            rate = file.streams.audio[0].rate
            resampler = av.AudioResampler(format="fltp", layout="mono")
            frames = [out for frame in file.decode(audio=0) for out in resampler.resample(frame)]
            frames += resampler.resample(None)
    except (av.FFmpegError, ValueError) as error:
        raise Rejected("unreadable", f"not readable as audio ({error})") from None
    parts = [frame.to_ndarray()[0] for frame in frames]
    return np.concatenate(parts or [np.zeros(0, np.float32)]), rate


def _decode_file(
    source: str | io.BytesIO, offset: float, seconds: float
) -> tuple[np.ndarray, int, float]:
    """float32 mono samples of a part, their rate, and the length of the whole file in seconds."""
    try:
        with soundfile.SoundFile(source) as file:
            rate, total = file.samplerate, file.frames
            start = min(round(offset * rate), total)
            count = total - start if not seconds else min(round(seconds * rate), total - start)
            file.seek(start)
            samples = file.read(count, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        text = str(error)
        is_truncated = "lost sync" in text or "Unspecified internal error" in text
        raise Rejected(
            "truncated" if is_truncated else "unreadable", f"not readable as audio ({text})"
        ) from None
    if len(samples) < count:
        raise Rejected(
            "truncated",
            f"the header says {total / rate:.2f} s, the file ends at "
            f"{(start + len(samples)) / rate:.2f} s",
        )
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1), rate, total / rate


def decode(
    source: str | bytes, offset: float, seconds: float, *, is_whole: bool, tolerance: float
) -> np.ndarray:
    """Decodes a part of an audio file.

    Args:
        source: a path, or the content of a file.
        offset: start of the part in seconds.
        seconds: length of the part (0: to the end of the file).
        is_whole: whether the part is expected to be the whole file.
        tolerance: seconds by which the file may be shorter than the part or, if `is_whole`, longer.

    Returns:
        int16 samples [n] at 16 kHz.

    Raises:
        Rejected: the audio cannot be used.
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
        if is_path and (reason := audio.wav_truncation(source)):
            raise Rejected("truncated", reason)
        samples, rate, length = _decode_file(
            source if is_path else io.BytesIO(source), offset, seconds
        )
    if length == 0:
        raise Rejected("zero_length", "the file contains no samples")
    is_shorter = offset + seconds > length + tolerance
    if seconds and (is_shorter or (is_whole and abs(length - seconds) > tolerance)):
        part = f"{seconds:.2f} s" if not offset else f"{offset:.2f} s to {offset + seconds:.2f} s"
        raise Rejected(
            "duration_mismatch", f"the file is {length:.2f} s long, the manifest says {part}"
        )
    return from_float(samples, rate)


def from_float(samples: np.ndarray, rate: int) -> np.ndarray:
    """Converts mono float samples [n] in [-1, 1] at any rate to int16 at 16 kHz.

    Raises:
        Rejected: the samples are missing, not finite or silent.
    """
    if not len(samples):
        raise Rejected("zero_length", "the clip contains no samples")
    if not np.isfinite(samples).all():
        raise Rejected("not_finite", "the clip contains NaN or infinite samples")
    samples = audio.to_int16(audio.resample(samples, rate))
    if not samples.any():
        raise Rejected("silent", f"all {len(samples) / SAMPLE_RATE:.2f} s are digital silence")
    return samples
