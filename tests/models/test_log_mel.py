"""Log-mel of windows against the log-mel of the whole recording."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from signals import SECOND, speech_like

from fastslm_jax import audio, sharding
from fastslm_jax.models import log_mel


def whole_log_mel(samples: np.ndarray, num_mels: int) -> np.ndarray:
    """Reference on a whole recording in float64: [frames, num_mels]."""
    padded = np.pad(samples.astype(np.float64), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: len(samples) // 160]
    power = np.abs(np.fft.rfft(frames * np.hanning(401)[:400])) ** 2
    mel = np.log10(np.maximum(power @ log_mel.mel_filters(num_mels), 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


def batch_of(recordings: list[np.ndarray], slots: int, spec: audio.WindowSpec):
    """One row of windows: the recordings one after another, then empty windows."""
    windows = np.zeros((1, slots, spec.samples + 2 * audio.CONTEXT), recordings[0].dtype)
    frames, numbers = np.zeros((1, slots), np.int32), np.full((1, slots), -1, np.int32)
    at = 0
    for number, samples in enumerate(recordings):
        part, valid = spec.cut(samples)
        where = slice(at, at + len(part))
        windows[0, where], frames[0, where], numbers[0, where] = part, valid, number
        at += len(part)
    return windows, frames, numbers


compute_log_mel = jax.jit(log_mel.log_mel, static_argnums=3)


def test_mel_filters_follow_slaney():
    filters = log_mel.mel_filters(128)
    assert filters.shape == (201, 128)
    assert (filters >= 0).all()
    # Below 1 kHz the scale is linear, 200/3 Hz per mel; 80 bands up to 8 kHz (45.245 mel) are
    # 37.24 Hz apart and 74.5 Hz wide.
    edges = np.linspace(0, 15 + np.log(8) * 27 / np.log(6.4), 82) * 200 / 3
    low = log_mel.mel_filters(80)[:, 10]
    assert np.flatnonzero(low).tolist() == [
        bin for bin in range(201) if edges[10] < 40 * bin < edges[12]
    ]
    assert low.max() <= 2 / (edges[12] - edges[10])  # unit area


def test_joined_windows_match_the_whole_recording():
    samples = speech_like(3.4)
    mel = compute_log_mel(*batch_of([samples], 4, audio.WindowSpec(frames=100)), 128)
    assert mel.shape == (1, 4, 100, 128)
    joined = np.asarray(mel).reshape(400, 128)
    np.testing.assert_allclose(joined[:340], whole_log_mel(samples, 128), atol=1e-4)
    assert not joined[340:].any()


def test_recordings_in_one_row_are_independent():
    spec = audio.WindowSpec(frames=100)
    recordings = [
        speech_like(2.3, seed=1),
        speech_like(0.4, seed=2, level=1e-3),
        speech_like(1.0, seed=3),
    ]
    mixed = np.asarray(compute_log_mel(*batch_of(recordings, 6, spec), 80))[0]
    for samples, where in zip(recordings, (slice(0, 3), slice(3, 4), slice(4, 5)), strict=True):
        alone = np.asarray(compute_log_mel(*batch_of([samples], 6, spec), 80))[0]
        np.testing.assert_array_equal(mixed[where], alone[: where.stop - where.start])
    assert not mixed[5].any()  # the empty window


def test_normalization_uses_the_maximum_of_the_recording():
    loud_then_quiet = np.concatenate([speech_like(1.0), speech_like(1.0, level=1e-6)])
    spec = audio.WindowSpec(frames=100)
    together = np.asarray(compute_log_mel(*batch_of([loud_then_quiet], 2, spec), 80))[0]
    # Quiet frames are more than 80 dB below the loud window, hence at the floor: 8 below the
    # maximum in log10, 2 in normalized units.
    np.testing.assert_allclose(together[1, 10:], together.max() - 2.0, atol=1e-6)
    apart = np.asarray(
        compute_log_mel(
            *batch_of([loud_then_quiet[:SECOND], loud_then_quiet[SECOND:]], 2, spec), 80
        )
    )[0]
    assert apart[1, 10:].max() > apart[1].max() - 2.0 + 0.5
    assert apart[1].max() < together[1].min()


def test_int16_and_float_samples_are_equivalent():
    spec, integers = audio.WindowSpec(frames=100), audio.to_int16(speech_like(1.5))
    from_int = compute_log_mel(*batch_of([integers], 2, spec), 80)
    from_float = compute_log_mel(*batch_of([integers.astype(np.float32) / 32768], 2, spec), 80)
    np.testing.assert_array_equal(from_int, from_float)


def test_padding_modes_differ_only_after_the_end():
    samples = speech_like(1.3)

    def mel_of(padding):
        windows = batch_of([samples], 2, audio.WindowSpec(100, padding))
        return np.asarray(compute_log_mel(*windows, 80)).reshape(200, 80)

    released, whisper = (mel_of(padding) for padding in audio.PADDINGS)
    # The last two frames overlap the padding.
    np.testing.assert_allclose(released[:128], whisper[:128], atol=1e-5)
    assert not released[130:].any()
    np.testing.assert_allclose(whisper[132:], whisper.max() - 2.0, atol=1e-6)  # silence: the floor


@pytest.mark.parametrize("where", ["rows", "windows"])
def test_spectrum_is_computed_where_its_windows_are(where):
    """Training rows, or windows of one recording: an FFT would make XLA gather the samples."""
    mesh = sharding.make_mesh(data=4, fsdp=2)
    spec = sharding.ROWS if where == "rows" else jax.sharding.PartitionSpec(None, *sharding.ROWS)
    shape = (8, 2) if where == "rows" else (1, 8)
    samples = audio.WindowSpec(frames=100).samples + 2 * audio.CONTEXT

    @functools.partial(jax.jit, in_shardings=jax.sharding.NamedSharding(mesh, spec))
    def maxima(windows):
        with sharding.activations_on(mesh):
            return log_mel.window_maxima(windows, jnp.full(shape, 100), 80)

    text = maxima.lower(jax.ShapeDtypeStruct((*shape, samples), jnp.int16)).compile().as_text()
    gathers = [line for line in text.splitlines() if "all-gather(" in line]
    assert not [line for line in gathers if f",{samples}]" in line], gathers
