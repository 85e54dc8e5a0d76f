"""From files to log-mel: decoding, cutting, and windows that add up to the log-mel of the whole recording."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from fastslm_jax import audio, sharding
from fastslm_jax.errors import UserError

SECOND = audio.SAMPLE_RATE


def speech_like(seconds: float, seed: int = 0, level: float = 0.3) -> np.ndarray:
    """Three tones that swell and fade, over quiet noise: float32 in [-1, 1]."""
    t = np.arange(round(seconds * SECOND)) / SECOND
    rng = np.random.default_rng(seed)
    tones = np.zeros(len(t))
    for frequency, swell in ((220, 3), (700, 5), (2500, 2)):
        tones += np.sin(2 * np.pi * frequency * t + rng.uniform(0, 6)) * (1 + np.sin(2 * np.pi * swell * t))
    return (level * (tones / 6 + 1e-3 * rng.standard_normal(len(t)))).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------------ files


def test_wav_flac_and_mp3_of_the_same_content(tmp_path):
    samples = audio.to_int16(speech_like(2.0))
    for name in ("a.wav", "a.flac", "a.mp3"):
        soundfile.write(tmp_path / name, samples, SECOND)
    wav, flac, mp3 = (audio.read_audio(tmp_path / name) for name in ("a.wav", "a.flac", "a.mp3"))
    assert wav.dtype == flac.dtype == mp3.dtype == np.int16
    np.testing.assert_array_equal(wav, samples)
    np.testing.assert_array_equal(flac, samples)
    assert abs(len(mp3) - len(wav)) <= 1152  # a frame of MPEG audio
    shared = min(len(mp3), len(wav))
    assert np.std(mp3[:shared] - samples[:shared].astype(float)) < 0.1 * np.std(samples)


def test_stereo_at_another_rate_becomes_mono_at_16_khz(tmp_path):
    t = np.arange(44_100) / 44_100
    left, right = np.sin(2 * np.pi * 440 * t), 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "stereo.wav", 0.5 * np.stack([left, right], axis=1), 44_100)
    samples = audio.read_audio(tmp_path / "stereo.wav")
    assert len(samples) == SECOND
    spectrum = np.abs(np.fft.rfft(samples / 32768)) / (SECOND / 2)
    assert np.argmax(spectrum) == 440  # 1 s: bins are 1 Hz apart
    assert spectrum[440] == pytest.approx(0.5 * 0.75, rel=0.01)


def test_offset_and_duration_pick_a_part(tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(2.0), SECOND)
    whole = audio.read_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "a.wav", 0.5, 1.0), whole[8_000:24_000])
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "a.wav", 1.5), whole[24_000:])


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_blocks_of_a_long_file_are_the_file(tmp_path, monkeypatch, rate):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", rng.normal(0, 0.1, (round(5.3 * rate), 2)), rate)
    whole = audio.read_audio(tmp_path / "long.wav", 0.25, 4.5)
    monkeypatch.setattr(audio, "BLOCK", 1)
    blocks = audio.read_audio(tmp_path / "long.wav", 0.25, 4.5)
    assert len(blocks) == len(whole) == 72_000
    assert np.abs(blocks.astype(int) - whole).max() <= (0 if rate == SECOND else 1)


@pytest.mark.parametrize("padding", audio.PADDINGS)
@pytest.mark.parametrize("samples", [100, 16_000, 16_100, 47_999, 48_000, 48_159, 50_000])
def test_windows_one_by_one_are_those_of_the_whole(samples, padding):
    """Against the whole recording, padded and reflected at once."""
    spec = audio.WindowSpec(frames=100, padding=padding)
    recording = audio.to_int16(speech_like(samples / SECOND))
    whole = np.pad(recording, (0, max(0, SECOND - samples)))
    count = spec.count(samples)
    if padding == "whisper":
        whole = np.pad(whole, (0, max(0, count * SECOND - len(whole))))
    whole = np.pad(np.pad(whole, audio.CONTEXT, mode="reflect"), (0, SECOND))
    windows, frames = spec.cut(recording)
    assert len(windows) == len(frames) == count
    for i in range(count):
        np.testing.assert_array_equal(windows[i], whole[i * SECOND : (i + 1) * SECOND + 2 * audio.CONTEXT])
        np.testing.assert_array_equal(spec.windows(recording, i, i + 1)[0], windows[i])


def test_to_int16_rounds_and_clips():
    assert audio.to_int16(np.array([0.0, 0.5, -1.0, 1.0, -3.0, 1.4 / 32768, 1.6 / 32768])).tolist() == [
        0, 16384, -32768, 32767, -32768, 1, 2,
    ]  # fmt: skip


def write_nan(path):
    soundfile.write(path, np.array([0.0, np.nan, 0.1], np.float32), SECOND, subtype="FLOAT")


@pytest.mark.parametrize(
    ("write", "offset", "message"),
    [
        (lambda path: None, 0.0, "no such audio file"),
        (lambda path: path.write_bytes(b"these are words, not samples"), 0.0, "not readable as audio"),
        (lambda path: soundfile.write(path, np.zeros(0), SECOND), 0.0, "holds no samples"),
        (lambda path: soundfile.write(path, speech_like(1.0), SECOND), 2.5, r"offset 2.5 s lies behind its end \(1.00 s\)"),
        (write_nan, 0.0, "holds samples that are not numbers"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, write, offset, message):
    path = tmp_path / "bad.wav"
    write(path)
    with pytest.raises(audio.AudioError, match=message) as raised:
        audio.read_audio(path, offset)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("samples", "windows"),
    [(1, 1), (SECOND, 1), (30 * SECOND, 1), (30 * SECOND + 159, 1), (30 * SECOND + 160, 2), (60 * SECOND, 2), (300 * SECOND, 10)],
)
def test_windows_of_30_seconds(samples, windows):
    assert audio.WindowSpec().count(samples) == windows


@pytest.mark.parametrize(
    ("padding", "seconds", "frames"),
    [
        ("released", 45.0, [3000, 1500]),
        ("whisper", 45.0, [3000, 3000]),
        ("released", 0.3, [100]),  # padded to one second first
        ("whisper", 0.3, [3000]),
        ("released", 30.0, [3000]),
    ],
)
def test_valid_frames(padding, seconds, frames):
    windows, valid = audio.WindowSpec(padding=padding).cut(np.zeros(round(seconds * SECOND), np.int16))
    assert windows.shape == (len(frames), 480_400)
    assert windows.dtype == np.int16
    assert valid.tolist() == frames


def test_windows_carry_their_neighbours_samples():
    samples = np.arange(3 * SECOND, dtype=np.int16)
    windows, _ = audio.WindowSpec(frames=100).cut(samples)
    assert windows.shape == (3, SECOND + 400)
    np.testing.assert_array_equal(windows[1], samples[SECOND - 200 : 2 * SECOND + 200])
    np.testing.assert_array_equal(windows[0, :200], samples[200:0:-1])  # reflected at the recording's start
    np.testing.assert_array_equal(windows[2, -200:], samples[-2:-202:-1])  # and at its end


def test_unknown_padding_is_refused():
    with pytest.raises(UserError, match=r"audio padding 'zeros' is not one of \('released', 'whisper'\)"):
        audio.WindowSpec(padding="zeros")


# ---------------------------------------------------------------------------------------------------------------- log-mel


def whole_log_mel(samples: np.ndarray, num_mels: int) -> np.ndarray:
    """The definition, on a whole recording, in float64: [frames, num_mels]."""
    padded = np.pad(samples.astype(np.float64), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: len(samples) // 160]
    power = np.abs(np.fft.rfft(frames * np.hanning(401)[:400])) ** 2
    mel = np.log10(np.maximum(power @ audio.mel_filters(num_mels), 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


def batch_of(recordings: list[np.ndarray], slots: int, spec: audio.WindowSpec):
    """One row of windows: recordings one after another, then empty slots."""
    windows = np.zeros((1, slots, spec.samples + 2 * audio.CONTEXT), recordings[0].dtype)
    frames, numbers = np.zeros((1, slots), np.int32), np.full((1, slots), -1, np.int32)
    at = 0
    for number, samples in enumerate(recordings):
        part, valid = spec.cut(samples)
        where = slice(at, at + len(part))
        windows[0, where], frames[0, where], numbers[0, where] = part, valid, number
        at += len(part)
    return windows, frames, numbers


log_mel = jax.jit(audio.log_mel, static_argnums=3)


def test_filters_peak_where_slaney_puts_them():
    filters = audio.mel_filters(128)
    assert filters.shape == (201, 128)
    assert (filters >= 0).all()
    # Below 1 kHz bands are linear, 200/3 Hz a mel; 80 bands to 8 kHz (45.245 mel) are 37.24 Hz apart and 74.5 Hz wide.
    edges = np.linspace(0, 15 + np.log(8) * 27 / np.log(6.4), 82) * 200 / 3
    low = audio.mel_filters(80)[:, 10]
    assert np.flatnonzero(low).tolist() == [bin for bin in range(201) if edges[10] < 40 * bin < edges[12]]
    assert low.max() <= 2 / (edges[12] - edges[10])  # unit area: the peak is 2 / width


def test_windows_join_to_the_log_mel_of_the_whole_recording():
    samples = speech_like(3.4)
    mel = log_mel(*batch_of([samples], 4, audio.WindowSpec(frames=100)), 128)
    assert mel.shape == (1, 4, 100, 128)
    joined = np.asarray(mel).reshape(400, 128)
    np.testing.assert_allclose(joined[:340], whole_log_mel(samples, 128), atol=1e-5)
    assert not joined[340:].any()


@pytest.mark.parametrize(("power", "tolerance"), [(audio.power_by_fft, 1e-6), (audio.power_by_product, 1e-4)])
def test_both_spectra_are_the_definition(power, tolerance):
    """The FFT is what a CPU runs, the product what TPUs and GPUs run; errors of log-mel."""
    samples = speech_like(3.4)
    windows, _ = audio.WindowSpec(frames=340).cut(samples)
    mel = np.log10(np.maximum(jax.jit(power)(windows[None])[0, 0] @ audio.mel_filters(128), 1e-10))
    np.testing.assert_allclose((np.maximum(mel, mel.max() - 8) + 4) / 4, whole_log_mel(samples, 128), atol=tolerance)


def test_recordings_in_one_row_do_not_touch_each_other():
    spec = audio.WindowSpec(frames=100)
    recordings = [speech_like(2.3, seed=1), speech_like(0.4, seed=2, level=1e-3), speech_like(1.0, seed=3)]
    mixed = np.asarray(log_mel(*batch_of(recordings, 6, spec), 80))[0]
    for samples, where in zip(recordings, (slice(0, 3), slice(3, 4), slice(4, 5)), strict=True):
        alone = np.asarray(log_mel(*batch_of([samples], 6, spec), 80))[0]
        np.testing.assert_array_equal(mixed[where], alone[: where.stop - where.start])
    assert not mixed[5].any()  # the empty slot


def test_the_maximum_is_the_recordings():
    loud_then_quiet = np.concatenate([speech_like(1.0), speech_like(1.0, level=1e-6)])
    spec = audio.WindowSpec(frames=100)
    together = np.asarray(log_mel(*batch_of([loud_then_quiet], 2, spec), 80))[0]
    # Quiet frames lie more than 80 dB under the loud window: they are all at the floor, max − 8 in log10, 2 in mel units.
    np.testing.assert_allclose(together[1, 10:], together.max() - 2.0, atol=1e-6)
    apart = np.asarray(log_mel(*batch_of([loud_then_quiet[:SECOND], loud_then_quiet[SECOND:]], 2, spec), 80))[0]
    assert apart[1, 10:].max() > apart[1].max() - 2.0 + 0.5
    assert apart[1].max() < together[1].min()


def test_int16_and_float_samples_give_the_same():
    spec, integers = audio.WindowSpec(frames=100), audio.to_int16(speech_like(1.5))
    from_int = log_mel(*batch_of([integers], 2, spec), 80)
    from_float = log_mel(*batch_of([integers.astype(np.float32) / 32768], 2, spec), 80)
    np.testing.assert_array_equal(from_int, from_float)


def test_paddings_differ_behind_the_end_only():
    samples = speech_like(1.3)
    mels = [
        np.asarray(log_mel(*batch_of([samples], 2, audio.WindowSpec(100, padding)), 80))[0].reshape(200, 80)
        for padding in audio.PADDINGS
    ]
    released, whisper = mels
    np.testing.assert_allclose(released[:128], whisper[:128], atol=1e-5)  # two frames see beyond the end
    assert not released[130:].any()
    np.testing.assert_allclose(whisper[132:], whisper.max() - 2.0, atol=1e-6)  # silence: the floor


@pytest.mark.parametrize("where", ["rows", "windows"])
def test_a_spectrum_stays_on_the_devices_of_its_windows(where):
    """Rows of a training batch, or windows of one recording that is answered: XLA alone would gather them for an FFT."""
    mesh = sharding.make_mesh(data=4, fsdp=2)
    spec = sharding.ROWS if where == "rows" else jax.sharding.PartitionSpec(None, *sharding.ROWS)
    shape, samples = ((8, 2), (1, 8))[where == "windows"], audio.WindowSpec(frames=100).samples + 2 * audio.CONTEXT

    @functools.partial(jax.jit, in_shardings=jax.sharding.NamedSharding(mesh, spec))
    def maxima(windows):
        with sharding.activations_on(mesh):
            return audio.window_maxima(windows, jnp.full(shape, 100), 80)

    text = maxima.lower(jax.ShapeDtypeStruct((*shape, samples), jnp.int16)).compile().as_text()
    gathers = [line for line in text.splitlines() if "all-gather(" in line]
    assert not [line for line in gathers if f",{samples}]" in line], gathers
