"""Audio on the host: files to int16 samples, and samples to encoder windows.

Windows are cut so that the device can compute Whisper's log-mel spectrogram of the whole recording
exactly (see `models.log_mel`): frames are centered, and the recording is reflected at both ends. A
window therefore carries CONTEXT samples of its neighbors on each side.

The last window is padded in one of two ways:
  released  as in the released checkpoints: zeros after the log-mel of the audio.
  whisper   as in OpenAI's code: zeros after the audio, so that the log-mel covers the padding too.
"""

import dataclasses
import os
import pathlib
import struct

import numpy as np
import soundfile
import soxr

from fastslm_jax.errors import UserError

SAMPLE_RATE = 16_000
N_FFT = 400
HOP = 160
CONTEXT = N_FFT // 2  # samples of the neighboring windows on each side of a window
MIN_SAMPLES = SAMPLE_RATE  # shorter recordings are padded with zeros
BLOCK_SECONDS = 600  # longer files are decoded in blocks
PADDINGS = ("released", "whisper")
_MAX_RIFF_SIZE = 0xFFFFFF00  # larger sizes mean "unknown" (written by streams)


class AudioError(UserError):
    """A file cannot be used as audio. The message gives the file, the reason and the fix."""


def _not_readable(path: pathlib.Path, error: soundfile.LibsndfileError) -> AudioError:
    return AudioError(
        f"{path}: not readable as audio ({error}); convert it to wav, flac, ogg or mp3"
    )


def wav_truncation(path: str | os.PathLike) -> str | None:
    """Describes how a wav file is truncated; None if it is not.

    libsndfile reads a truncated file without an error, but the size in the header reveals it.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
    if len(head) == 8 and head[:4] == b"RIFF":
        (declared,) = struct.unpack_from("<I", head, 4)
        if declared + 8 > size and declared < _MAX_RIFF_SIZE:
            return f"the header says {declared + 8} bytes, the file has {size}"
    return None


def read_audio(
    path: str | os.PathLike, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Decodes a wav, flac, ogg or mp3 file. Long files are decoded in blocks to save memory.

    Args:
        path: the file.
        offset: start in seconds.
        duration: length in seconds (None: to the end of the file).

    Returns:
        Mono int16 samples [n] at 16 kHz.

    Raises:
        AudioError: the file is missing, unreadable or empty, or ends before `offset`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, total = file.samplerate, file.frames
            start = round(offset * rate)
            if start > total:
                raise AudioError(
                    f"{path}: offset {offset} s is after the end of the file ({total / rate:.2f} s)"
                )
            file.seek(start)
            count = max(0, total - start)
            count = count if duration is None else min(count, round(duration * rate))
            samples = _decode(file, count, str(path))
    except soundfile.LibsndfileError as error:
        raise _not_readable(path, error) from None
    if not len(samples):
        raise AudioError(f"{path}: contains no samples")
    return samples


def _decode(file: soundfile.SoundFile, count: int, name: str) -> np.ndarray:
    """Reads the next `count` frames of an open file as mono int16 at 16 kHz."""
    rate = file.samplerate
    if (rate, file.channels, file.subtype) == (SAMPLE_RATE, 1, "PCM_16"):  # no conversion needed
        return file.read(count, dtype="int16", always_2d=True)[:, 0]
    if count <= BLOCK_SECONDS * rate:
        samples = file.read(count, dtype="float32", always_2d=True).mean(axis=1)
        return to_int16(resample(samples, rate), name)
    stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1)
    parts, left = [], count
    while left:
        block = file.read(min(left, BLOCK_SECONDS * rate), dtype="float32", always_2d=True)
        block = block.mean(axis=1)
        left = (
            left - len(block) if len(block) else 0
        )  # the file may be shorter than its header says
        if stream is not None:
            block = stream.resample_chunk(block, last=not left)
        parts.append(to_int16(block, name))
    return np.concatenate(parts)


def probe(path: str | os.PathLike) -> float:
    """Length of an audio file in seconds, from its header and first second.

    Raises:
        AudioError: the file is missing, unreadable, empty or truncated.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            if not len(file.read(min(file.frames, file.samplerate), dtype="int16", always_2d=True)):
                raise AudioError(f"{path}: contains no samples")
            if reason := wav_truncation(path):
                raise AudioError(
                    f"{path}: truncated ({reason}); copy it again, or convert the rest to flac"
                )
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        raise _not_readable(path, error) from None


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resamples float32 samples [n] from `rate` to 16 kHz."""
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)


def to_int16(samples: np.ndarray, name: str = "audio") -> np.ndarray:
    """Converts float samples in [-1, 1] to int16, rounded and clipped.

    Raises:
        AudioError: samples are NaN or infinite; the message starts with `name`.
    """
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: contains NaN or infinite samples")
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """How recordings are cut into encoder windows.

    Attributes:
        frames: log-mel frames per window (Whisper: 3000, 30 s).
        padding: one of PADDINGS; see the module docstring.
    """

    frames: int = 3000
    padding: str = "released"

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise UserError(f"audio padding {self.padding!r} is not one of {', '.join(PADDINGS)}")

    @property
    def samples(self) -> int:
        """Samples per window, without context."""
        return self.frames * HOP

    @property
    def seconds(self) -> float:
        """Length of a window."""
        return self.samples / SAMPLE_RATE

    def count(self, num_samples: int | np.ndarray) -> int | np.ndarray:
        """Number of windows of a recording, or of each of several recordings."""
        maximum = np.maximum if isinstance(num_samples, np.ndarray) else max
        frames = maximum(num_samples, MIN_SAMPLES) // HOP
        return -(-frames // self.frames)

    def cut(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts a recording [n] into windows.

        Example: 45 s in windows of 30 s → windows [2, 480 400], valid frames [3000, 1500]
        (padding "released").

        Returns:
            Windows [count, samples + 2·CONTEXT] in the recording's dtype, and the number of valid
            frames of each [count] int32.
        """
        frames = self.valid_frames(len(samples))
        return self.windows(samples, 0, len(frames)), frames

    def valid_frames(self, num_samples: int) -> np.ndarray:
        """Frames of each window that belong to the recording: [count] int32."""
        count = self.count(num_samples)
        if self.padding == "whisper":
            frames = count * self.frames
        else:
            frames = max(num_samples, MIN_SAMPLES) // HOP
        return np.clip(frames - self.frames * np.arange(count), 0, self.frames).astype(np.int32)

    def windows(self, samples: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Windows `start` to `stop` of a recording [n], as in `cut`, without copying all of it."""
        length = max(len(samples), MIN_SAMPLES)
        if self.padding == "whisper":
            length = max(length, self.count(len(samples)) * self.samples)

        def take(low: int, high: int) -> np.ndarray:  # zeros after the end of the recording
            part = samples[low : min(high, len(samples))]
            return np.pad(part, (0, high - low - len(part)))

        low, high = start * self.samples - CONTEXT, stop * self.samples + CONTEXT
        parts = [take(max(low, 0), min(high, length))]
        if low < 0:  # reflect the start
            parts.insert(0, take(1, 1 - low)[::-1])
        if high > length:  # reflect the end, followed by zeros
            parts.append(take(length - 1 - CONTEXT, length - 1)[::-1])
            parts.append(np.zeros(max(0, high - length - CONTEXT), samples.dtype))
        joined = np.concatenate(parts)[: high - low]
        width = self.samples + 2 * CONTEXT
        return np.stack(
            [joined[i * self.samples : i * self.samples + width] for i in range(stop - start)]
        )
