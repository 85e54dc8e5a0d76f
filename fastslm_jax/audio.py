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
import functools
import os
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
import soxr

from fastslm_jax import sharding
from fastslm_jax.errors import UserError

SAMPLE_RATE = 16_000
N_FFT = 400
HOP = 160
CONTEXT = N_FFT // 2  # samples of the neighbouring windows at each side of a window
MIN_SAMPLES = SAMPLE_RATE  # shorter recordings are padded with silence to one second
BLOCK = 600  # seconds that are decoded at a time
PADDINGS = ("released", "whisper")
LOWEST = -10.0  # log10 of the floor of the mel power


class AudioError(UserError):
    """A file that cannot be used as audio: says which, why and what to do."""


def riff_shortfall(path: str | os.PathLike) -> str | None:
    """What a cut wav file lacks: libsndfile reads what is left of it without a word, but its header knows better."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
    if len(head) == 8 and head[:4] == b"RIFF":
        (declared,) = struct.unpack_from("<I", head, 4)
        if declared + 8 > size and declared < 0xFFFFFF00:  # streams write such sizes when they do not know better
            return f"its header announces {declared + 8} bytes, the file has {size}"
    return None


def read_audio(path: str | os.PathLike, offset: float = 0.0, duration: float | None = None) -> np.ndarray:
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
                raise AudioError(f"{path}: offset {offset} s lies behind its end ({total / rate:.2f} s)")
            file.seek(start)
            count = max(0, total - start)
            count = count if duration is None else min(count, round(duration * rate))
            samples = _decode(file, count, str(path))
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: not readable as audio ({error}); convert it to wav, flac, ogg or mp3") from None
    if not len(samples):
        raise AudioError(f"{path}: holds no samples")
    return samples


def _decode(file: soundfile.SoundFile, count: int, name: str) -> np.ndarray:
    """The next `count` frames of an open file, mono int16 at 16 kHz; BLOCK seconds at a time if there are more."""
    rate = file.samplerate
    if (rate, file.channels, file.subtype) == (SAMPLE_RATE, 1, "PCM_16"):  # our own format: the way below gives the same, later
        return file.read(count, dtype="int16", always_2d=True)[:, 0]
    if count <= BLOCK * rate:
        return to_int16(resample(file.read(count, dtype="float32", always_2d=True).mean(axis=1), rate), name)
    stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1)
    parts, left = [], count
    while left:
        block = file.read(min(left, BLOCK * rate), dtype="float32", always_2d=True).mean(axis=1)
        left = left - len(block) if len(block) else 0  # a header may promise more than there is
        parts.append(to_int16(block if stream is None else stream.resample_chunk(block, last=not left), name))
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
                raise AudioError(f"{path}: is cut short ({missing}); copy it again, or convert what is left to flac")
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: not readable as audio ({error}); convert it to wav, flac, ogg or mp3") from None


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
        frames = (np.maximum if isinstance(num_samples, np.ndarray) else max)(num_samples, MIN_SAMPLES) // HOP
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
        frames = count * self.frames if self.padding == "whisper" else max(num_samples, MIN_SAMPLES) // HOP
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
        return np.stack([joined[i * self.samples : i * self.samples + width] for i in range(stop - start)])


@functools.cache
def mel_filters(num_mels: int) -> np.ndarray:
    """Slaney-normalised mel filters on the Slaney scale, 0 … 8 kHz: [N_FFT / 2 + 1, num_mels] float32."""

    def hz_to_mel(hz):
        hz = np.asarray(hz, np.float64)
        return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * 27 / np.log(6.4))

    def mel_to_hz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    edges = mel_to_hz(np.linspace(hz_to_mel(0), hz_to_mel(SAMPLE_RATE / 2), num_mels + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))
    return filters.astype(np.float32)


@functools.cache
def _hann() -> np.ndarray:
    """Periodic Hann window [N_FFT] float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)


@functools.cache
def _fourier_basis() -> np.ndarray:
    """Hann-windowed cosines and sines [N_FFT, 2·(N_FFT / 2 + 1)] float32: the DFT as one matrix product."""
    angles = 2 * np.pi * np.outer(np.arange(N_FFT), np.arange(N_FFT // 2 + 1)) / N_FFT
    return (_hann()[:, None] * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


def _frames(windows: jax.Array) -> jax.Array:
    """Windows [..., samples + 2·CONTEXT] → frames [..., n, N_FFT], one each HOP samples."""
    length = windows.shape[-1]
    num_blocks = (length - 2 * CONTEXT) // HOP + 2
    padding = [(0, 0)] * (windows.ndim - 1) + [(0, max(0, num_blocks * HOP - length))]
    blocks = jnp.pad(windows, padding)[..., : num_blocks * HOP].reshape(*windows.shape[:-1], num_blocks, HOP)
    return jnp.concatenate([blocks[..., :-2, :], blocks[..., 1:-1, :], blocks[..., 2:, : N_FFT - 2 * HOP]], axis=-1)


def power_by_product(windows: jax.Array) -> jax.Array:
    """Windows [rows, windows, samples + 2·CONTEXT] float32 → power spectra [rows, windows, frames, N_FFT / 2 + 1]."""
    # Quiet bands lie 80 dB under the loudest: bfloat16 products would drown them.
    spectrum = jnp.matmul(_frames(windows), _fourier_basis(), precision=jax.lax.Precision.HIGHEST)
    cosine, sine = jnp.split(spectrum, 2, axis=-1)
    return jnp.square(cosine) + jnp.square(sine)


def power_by_fft(windows: jax.Array) -> jax.Array:
    """The same in float64 inside: on a CPU three times as fast as the product, and exact. It has no gradient."""

    def power(window):
        frames = _frames(window)
        with jax.enable_x64(True):
            spectrum = jnp.fft.rfft(frames.astype(jnp.float64) * _hann())
            return (jnp.square(spectrum.real) + jnp.square(spectrum.imag)).astype(jnp.float32)

    def powers(windows):  # one at a time, so that the frames stay in the processor's caches
        return jax.lax.map(power, windows)

    flat, mesh = windows.reshape(-1, windows.shape[-1]), jax.sharding.get_abstract_mesh()
    if not mesh.empty and len(flat) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
        powers = jax.shard_map(powers, in_specs=sharding.ROWS, out_specs=sharding.ROWS)  # XLA would gather what an FFT takes
    out = powers(flat)
    return out.reshape(*windows.shape[:-1], *out.shape[1:])


def _log_spectrum(windows: jax.Array, num_mels: int) -> jax.Array:
    """Cut windows [rows, windows, samples + 2·CONTEXT] → log10 mel power [rows, windows, frames, num_mels] float32."""
    if windows.dtype == jnp.int16:
        windows = windows.astype(jnp.float32) / 32768.0
    power = jax.lax.platform_dependent(windows, cpu=power_by_fft, default=power_by_product)
    mel = jnp.matmul(power, mel_filters(num_mels), precision=jax.lax.Precision.HIGHEST)
    return jnp.log10(jnp.maximum(mel, 1e-10))


def _window_maxima(mel: jax.Array, valid_frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    is_valid = jnp.arange(mel.shape[2]) < valid_frames[:, :, None]
    return jnp.max(jnp.where(is_valid[..., None], mel, LOWEST), axis=(2, 3)), is_valid


def window_maxima(windows: jax.Array, valid_frames: jax.Array, num_mels: int) -> jax.Array:
    """The highest log10 mel power of each window, [rows, windows] (see `log_mel`)."""
    return _window_maxima(_log_spectrum(windows, num_mels), valid_frames)[0]


def log_mel(
    windows: jax.Array, valid_frames: jax.Array, recording: jax.Array, num_mels: int, elsewhere: jax.Array | None = None
) -> jax.Array:
    """Log-mel of cut windows, on the device.

    Args:
        windows: [rows, windows, samples + 2·CONTEXT], int16, or float32 in [-1, 1] (see `WindowSpec.cut`).
        valid_frames: [rows, windows]; frames from there on become 0.0.
        recording: [rows, windows]; windows of a row with equal numbers share the recording's maximum.
        elsewhere: [rows, windows]; the maximum of a recording's windows that are not here (see `window_maxima`).

    Returns:
        [rows, windows, frames, num_mels] float32.
    """
    mel = _log_spectrum(windows, num_mels)
    window_max, is_valid = _window_maxima(mel, valid_frames)
    same = recording[:, :, None] == recording[:, None, :]
    recording_max = jnp.max(jnp.where(same, window_max[:, None, :], LOWEST), axis=-1)
    if elsewhere is not None:
        recording_max = jnp.maximum(recording_max, elsewhere)
    mel = (jnp.maximum(mel, recording_max[:, :, None, None] - 8.0) + 4.0) / 4.0
    return jnp.where(is_valid[..., None], mel, 0.0)
