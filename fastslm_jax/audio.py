"""Audio: files to int16 samples, samples to windows (host), windows to log-mel (device).

Log-mel is Whisper's: 16 kHz, n_fft 400, hop 160, periodic Hann, centred frames with reflection at both ends of the
RECORDING, power spectrum, 128 (or 80) Slaney mel bands, log10 floored at 1e-10, then `max(x, recording's max − 8)`, then
`(x + 4) / 4`. A window of the recording carries CONTEXT samples of its neighbours at both sides, so that frames at window
borders are exact; the maximum is taken over all windows of a recording.

Two paddings of the last window are in use:
  released  the authors': the log-mel of the audio, then 0.0 up to the window's length;
  whisper   OpenAI's: zeros after the audio, so that the padding is silence that went through the log-mel.
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
CONTEXT = N_FFT // 2  # samples of the neighbouring windows at each side of a window
MIN_SAMPLES = SAMPLE_RATE  # shorter recordings are padded with silence to one second
BLOCK = 600  # seconds that are decoded at a time
PADDINGS = ("released", "whisper")


class AudioError(UserError):
    """A file that cannot be used as audio: says which, why and what to do."""


def riff_shortfall(path: str | os.PathLike) -> str | None:
    """What a cut wav file lacks: libsndfile reads what is left of it without a word, but its header knows better."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
    if len(head) == 8 and head[:4] == b"RIFF":
        (declared,) = struct.unpack_from("<I", head, 4)
        if (
            declared + 8 > size and declared < 0xFFFFFF00
        ):  # streams write such sizes when they do not know better
            return f"its header announces {declared + 8} bytes, the file has {size}"
    return None


def read_audio(
    path: str | os.PathLike, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Decodes a wav, flac, ogg or mp3 file (or seconds offset … offset + duration of it) to mono int16 at 16 kHz.

    Long files are decoded in blocks, so that the result is most of what it takes.
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
                    f"{path}: offset {offset} s lies behind its end ({total / rate:.2f} s)"
                )
            file.seek(start)
            count = max(0, total - start)
            count = count if duration is None else min(count, round(duration * rate))
            samples = _decode(file, count, str(path))
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: not readable as audio ({error}); convert it to wav, flac, ogg or mp3"
        ) from None
    if not len(samples):
        raise AudioError(f"{path}: holds no samples")
    return samples


def _decode(file: soundfile.SoundFile, count: int, name: str) -> np.ndarray:
    """The next `count` frames of an open file, mono int16 at 16 kHz; BLOCK seconds at a time if there are more."""
    rate = file.samplerate
    if (rate, file.channels, file.subtype) == (
        SAMPLE_RATE,
        1,
        "PCM_16",
    ):  # our own format: the way below gives the same, later
        return file.read(count, dtype="int16", always_2d=True)[:, 0]
    if count <= BLOCK * rate:
        return to_int16(
            resample(file.read(count, dtype="float32", always_2d=True).mean(axis=1), rate), name
        )
    stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1)
    parts, left = [], count
    while left:
        block = file.read(min(left, BLOCK * rate), dtype="float32", always_2d=True).mean(axis=1)
        left = left - len(block) if len(block) else 0  # a header may promise more than there is
        parts.append(
            to_int16(block if stream is None else stream.resample_chunk(block, last=not left), name)
        )
    return np.concatenate(parts)


def probe(path: str | os.PathLike) -> float:
    """Seconds of an audio file, whose header and first second are read; raises what `read_audio` would."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            if not len(file.read(min(file.frames, file.samplerate), dtype="int16", always_2d=True)):
                raise AudioError(f"{path}: holds no samples")
            if missing := riff_shortfall(path):
                raise AudioError(
                    f"{path}: is cut short ({missing}); copy it again, or convert what is left to flac"
                )
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: not readable as audio ({error}); convert it to wav, flac, ogg or mp3"
        ) from None


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 samples [n] at `rate` to 16 kHz."""
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)


def to_int16(samples: np.ndarray, name: str = "audio") -> np.ndarray:
    """float samples in [-1, 1] → int16, rounded and clipped."""
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds samples that are not numbers")
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """How recordings are cut. Whisper's window is 30 s = 3 000 frames."""

    frames: int = 3000
    padding: str = "released"

    def __post_init__(self):
        if self.padding not in PADDINGS:
            raise UserError(f"audio padding {self.padding!r} is not one of {PADDINGS}")

    @property
    def samples(self) -> int:
        return self.frames * HOP

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE

    def count(self, num_samples: int | np.ndarray) -> int | np.ndarray:
        """Windows that a recording of num_samples takes (or of each of several)."""
        frames = (np.maximum if isinstance(num_samples, np.ndarray) else max)(
            num_samples, MIN_SAMPLES
        ) // HOP
        return -(-frames // self.frames)

    def cut(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A recording [n] → windows [count, samples + 2·CONTEXT] of its dtype, and their valid frames [count] int32.

        Example: 45 s in windows of 30 s → windows [2, 480 400], frames [3000, 1500] (padding "released").
        """
        frames = self.valid_frames(len(samples))
        return self.windows(samples, 0, len(frames)), frames

    def valid_frames(self, num_samples: int) -> np.ndarray:
        """Frames of each window that are the recording's: [count] int32."""
        count = self.count(num_samples)
        frames = (
            count * self.frames
            if self.padding == "whisper"
            else max(num_samples, MIN_SAMPLES) // HOP
        )
        return np.clip(frames - self.frames * np.arange(count), 0, self.frames).astype(np.int32)

    def windows(self, samples: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Windows start … stop of a recording [n], as `cut` gives them: a long one need never be copied as a whole."""
        length = max(len(samples), MIN_SAMPLES)
        if self.padding == "whisper":
            length = max(length, self.count(len(samples)) * self.samples)

        def take(low, high):  # of the recording with zeros behind it
            part = samples[low : min(high, len(samples))]
            return np.pad(part, (0, high - low - len(part)))

        low, high = start * self.samples - CONTEXT, stop * self.samples + CONTEXT
        parts = [take(max(low, 0), min(high, length))]
        if low < 0:  # both ends are reflected; behind the second are zeros
            parts.insert(0, take(1, 1 - low)[::-1])
        if high > length:
            parts.append(take(length - 1 - CONTEXT, length - 1)[::-1])
            parts.append(np.zeros(max(0, high - length - CONTEXT), samples.dtype))
        joined = np.concatenate(parts)[: high - low]
        width = self.samples + 2 * CONTEXT
        return np.stack(
            [joined[i * self.samples : i * self.samples + width] for i in range(stop - start)]
        )
