"""Audio on the host: files to int16 samples, and samples to encoder windows.

Windows are cut so that the device can compute Whisper's log-mel spectrogram of the whole recording
exactly (see `models.log_mel`): frames are centered, and the recording is reflected at both ends. A
window therefore carries CONTEXT samples of its neighbors on each side.

The last window is padded in one of two ways:
  released  as in the released checkpoints: zeros after the log-mel of the audio.
  whisper   as in OpenAI's code: zeros after the audio, so that the log-mel covers the padding too.
"""

import contextlib
import dataclasses
import io
import itertools
import operator
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import soxr

from fastslm_jax.audio_files import read_blocks
from fastslm_jax.audio_headers import AudioError
from fastslm_jax.errors import UserError

SAMPLE_RATE = 16_000
N_FFT = 400
HOP = 160
CONTEXT = N_FFT // 2  # samples of the neighboring windows on each side of a window
MIN_SAMPLES = SAMPLE_RATE  # shorter recordings are padded with zeros
PADDINGS = ("released", "whisper")
MAX_PEAK = 2.0  # of float samples; up to here they are clipped, above they have another scale
MIN_MIXED_ENERGY = 0.02  # of the channels' mean energy, in their mix


class Levels:
    """The checks of samples that decoding yields, one block after another."""

    def __init__(self) -> None:
        self.peak, self.energy, self.mixed_energy = 0.0, 0.0, 0.0

    def mix(self, block: np.ndarray) -> np.ndarray:
        """Mixes float32 samples [channels, n] down to [n].

        Raises:
            AudioError: samples are NaN or infinite, or have another scale than [-1, 1].
        """
        peak = float(np.abs(block).max(initial=0.0))
        if not np.isfinite(peak):
            raise AudioError("contains NaN or infinite samples", "not_finite")
        if peak > MAX_PEAK:
            raise AudioError(
                f"the samples reach {peak:.6g}, full scale is 1; divide them by their scale, for "
                "example by 32768",
                "out_of_range",
            )
        self.peak = max(self.peak, peak)
        if len(block) == 1:
            return block[0]
        mixed = block.mean(axis=0)
        self.energy += float(np.square(block).sum()) / len(block)
        self.mixed_energy += float(np.square(mixed).sum())
        return mixed

    def check(self, seconds: float) -> None:
        """Checks the whole recording, whose length is given for the message.

        Raises:
            AudioError: there is no sound, or it is lost because the channels cancel each other.
        """
        if self.peak <= 0.5 / 32768:  # rounded to zero
            raise AudioError(f"all {seconds:.2f} s are digital silence", "silent")
        if self.mixed_energy < MIN_MIXED_ENERGY * self.energy:
            raise AudioError(
                "the channels cancel each other when they are mixed (opposite phase); keep one "
                "channel, for example with: sox IN OUT remix 1",
                "opposite_phase",
            )


def stream(blocks: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    """Mixes, resamples and checks audio, block after block.

    Args:
        blocks: sample rates, and float32 samples [channels, n] whose full scale is 1.

    Yields:
        Mono int16 samples [n] at 16 kHz.

    Raises:
        AudioError: there are no samples, or they cannot be used; see `Levels`.
    """
    levels, count = Levels(), 0
    for rate, group in itertools.groupby(blocks, key=operator.itemgetter(0)):
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1)
        for block in itertools.chain((block for _, block in group), [None]):
            if block is None:
                samples = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            else:
                samples = resampler.resample_chunk(levels.mix(block))
            count += len(samples)
            yield to_int16(samples)
    if not count:
        raise AudioError("contains no samples", "zero_length")
    levels.check(count / SAMPLE_RATE)


@contextlib.contextmanager
def _open(source: str | os.PathLike | bytes) -> Iterator[BinaryIO]:
    is_content = isinstance(source, bytes)
    if not is_content and not os.path.isfile(source):
        raise AudioError("no such audio file", "missing_file")
    try:
        with io.BytesIO(source) if is_content else open(source, "rb") as file:
            yield file
    except OSError as error:
        raise AudioError(f"cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """Puts the path before the message of an error."""
    try:
        yield
    except AudioError as error:
        raise AudioError(f"{path}: {error}", error.kind) from None


def decode(
    source: str | os.PathLike | bytes, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Decodes a path or the content of a file like `read_audio`; errors do not name the file."""
    with _open(source) as file:
        return np.concatenate(list(stream(read_blocks(file, offset, duration))))


def read_audio(
    path: str | os.PathLike, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Decodes a file of any format (see `audio_files`), in blocks to save memory.

    Args:
        path: the file.
        offset: start in seconds.
        duration: length in seconds (None: to the end of the file).

    Returns:
        Mono int16 samples [n] at 16 kHz.

    Raises:
        AudioError: the file is missing, unreadable, empty or truncated, ends before `offset`, or
            its samples cannot be used.
    """
    with _named(path):
        return decode(path, offset, duration)


def probe(path: str | os.PathLike) -> float:
    """Length of an audio file in seconds: that of the samples of `read_audio`, which are decoded.

    Raises:
        AudioError: as for `read_audio`.
    """
    with _named(path), _open(path) as file:
        return sum(len(samples) for samples in stream(read_blocks(file))) / SAMPLE_RATE


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resamples float32 samples [n] from `rate` to 16 kHz."""
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)


def to_int16(samples: np.ndarray, name: str = "audio") -> np.ndarray:
    """Converts float samples in [-1, 1] to int16, rounded and clipped.

    Raises:
        AudioError: samples are NaN or infinite; the message starts with `name`.
    """
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: contains NaN or infinite samples", "not_finite")
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
