"""Audio decoding for an import: any file to int16 samples at 16 kHz, or a classified rejection."""

import numpy as np

from fastslm_jax import audio
from fastslm_jax.audio import SAMPLE_RATE, AudioError

KINDS = (
    "broken_json",
    "bad_field",
    "outside_root",
    "missing_file",
    "unreadable",
    "truncated",
    "zero_length",
    "not_finite",
    "out_of_range",
    "silent",
    "opposite_phase",
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
    try:
        samples = audio.decode(source, offset, None if is_whole else seconds or None)
    except AudioError as error:
        raise Rejected(error.kind, str(error)) from None
    length = offset + len(samples) / SAMPLE_RATE
    is_shorter = offset + seconds > length + tolerance
    if seconds and (is_shorter or (is_whole and abs(length - seconds) > tolerance)):
        part = f"{seconds:.2f} s" if not offset else f"{offset:.2f} s to {offset + seconds:.2f} s"
        raise Rejected(
            "duration_mismatch", f"the file is {length:.2f} s long, the manifest says {part}"
        )
    return samples[: round(seconds * SAMPLE_RATE)] if seconds else samples


def from_float(samples: np.ndarray, rate: int) -> np.ndarray:
    """Converts mono float samples [n] in [-1, 1] at any rate to int16 at 16 kHz.

    Raises:
        Rejected: the samples are missing, or cannot be used.
    """
    try:
        return np.concatenate(list(audio.stream([(rate, samples[None])] if len(samples) else [])))
    except AudioError as error:
        raise Rejected(error.kind, str(error)) from None
