"""Log-mel spectrogram of audio windows, computed on the device as matrix products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.audio import CONTEXT, HOP, N_FFT, SAMPLE_RATE

LOWEST = -10.0  # log10 of the smallest mel power


@functools.cache
def mel_filters(num_mels: int) -> np.ndarray:
    """Slaney-normalized mel filters, 0 to 8 kHz: [N_FFT / 2 + 1, num_mels] float32."""

    def hz_to_mel(hz: float) -> np.ndarray:  # Slaney scale: linear below 1 kHz, then logarithmic
        hz = np.asarray(hz, np.float64)
        return np.where(
            hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * 27 / np.log(6.4)
        )

    def mel_to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    edges = mel_to_hz(np.linspace(hz_to_mel(0), hz_to_mel(SAMPLE_RATE / 2), num_mels + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))
    return filters.astype(np.float32)


@functools.cache
def _fourier_basis() -> tuple[np.ndarray, np.ndarray]:
    """Hann-windowed cosine and sine tables of the folded DFT: two [N_FFT / 2, N_FFT / 2 + 1].

    The Hann window is symmetric and zero at sample 0, so samples n and N_FFT - n share a row:
    their sum is multiplied by the cosine and their difference by the sine, which halves the
    matrix products. Sample N_FFT / 2 is its own mirror image and gets half the weight.
    """
    n = np.arange(1, N_FFT // 2 + 1)
    angles = 2 * np.pi * np.outer(n, np.arange(N_FFT // 2 + 1)) / N_FFT
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / N_FFT)
    window[-1] /= 2
    cosine, sine = (window[:, None] * table for table in (np.cos(angles), np.sin(angles)))
    return cosine.astype(np.float32), sine.astype(np.float32)


def _frames(windows: jax.Array) -> jax.Array:
    """Windows [..., samples + 2·CONTEXT] → frames [..., n, N_FFT], one every HOP samples."""
    length = windows.shape[-1]
    num_blocks = (length - 2 * CONTEXT) // HOP + 2
    padding = [(0, 0)] * (windows.ndim - 1) + [(0, max(0, num_blocks * HOP - length))]
    blocks = jnp.pad(windows, padding)[..., : num_blocks * HOP]
    blocks = blocks.reshape(*windows.shape[:-1], num_blocks, HOP)
    parts = [blocks[..., :-2, :], blocks[..., 1:-1, :], blocks[..., 2:, : N_FFT - 2 * HOP]]
    return jnp.concatenate(parts, axis=-1)


def power_spectrum(windows: jax.Array) -> jax.Array:
    """Windows [..., samples + 2·CONTEXT] float32 → power [..., frames, N_FFT / 2 + 1].

    The DFT is two matrix products, which are fast and can be sharded by rows on every backend.
    """
    frames, half = _frames(windows), N_FFT // 2
    first, mirrored = frames[..., 1 : half + 1], frames[..., : half - 1 : -1]
    cosine, sine = _fourier_basis()
    # Quiet bands are 80 dB below the loudest; single-pass bfloat16 products would lose them.
    real = jnp.matmul(first + mirrored, cosine, precision=jax.lax.Precision.HIGHEST)
    imaginary = jnp.matmul(first - mirrored, sine, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(real) + jnp.square(imaginary)


def _log_spectrum(windows: jax.Array, num_mels: int) -> jax.Array:
    """Windows [rows, windows, samples + 2·CONTEXT] → log10 mel power, float32.

    Returns [rows, windows, frames, num_mels].
    """
    if windows.dtype == jnp.int16:
        windows = windows.astype(jnp.float32) / 32768.0
    mel = jnp.matmul(
        power_spectrum(windows), mel_filters(num_mels), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.log10(jnp.maximum(mel, 1e-10))


def _window_maxima(mel: jax.Array, valid_frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maxima over valid frames [rows, windows], and their mask [rows, windows, frames]."""
    is_valid = jnp.arange(mel.shape[2]) < valid_frames[:, :, None]
    return jnp.max(jnp.where(is_valid[..., None], mel, LOWEST), axis=(2, 3)), is_valid


def window_maxima(windows: jax.Array, valid_frames: jax.Array, num_mels: int) -> jax.Array:
    """Maximum log10 mel power of each window, [rows, windows]; see `log_mel` for the arguments."""
    return _window_maxima(_log_spectrum(windows, num_mels), valid_frames)[0]


def log_mel(
    windows: jax.Array,
    valid_frames: jax.Array,
    recording: jax.Array,
    num_mels: int,
    elsewhere: jax.Array | None = None,
) -> jax.Array:
    """Whisper's log-mel features, normalized by the maximum of each recording.

    Args:
        windows: [rows, windows, samples + 2·CONTEXT], int16, or float32 in [-1, 1] (see
            `WindowSpec.cut`).
        valid_frames: [rows, windows], number of valid frames; later frames are set to 0.0.
        recording: [rows, windows], recording index; windows of a row with the same index are
            normalized together.
        elsewhere: [rows, windows], maximum over windows of the same recording that are not in
            this batch (see `window_maxima`).

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
