"""Audio: decoding of files, and cutting of recordings into windows."""

import numpy as np
import pytest
import soundfile
from signals import SECOND, speech_like

from fastslm_jax import audio, audio_files
from fastslm_jax.errors import UserError

# ---- Files


def test_formats_give_the_same_samples(tmp_path):
    samples = audio.to_int16(speech_like(2.0))
    for name in ("a.wav", "a.flac", "a.mp3"):
        soundfile.write(tmp_path / name, samples, SECOND)
    wav, flac, mp3 = (audio.read_audio(tmp_path / name) for name in ("a.wav", "a.flac", "a.mp3"))
    assert wav.dtype == flac.dtype == mp3.dtype == np.int16
    np.testing.assert_array_equal(wav, samples)
    np.testing.assert_array_equal(flac, samples)
    assert abs(len(mp3) - len(wav)) <= 1152  # one MPEG frame
    shared = min(len(mp3), len(wav))
    assert np.std(mp3[:shared] - samples[:shared].astype(float)) < 0.1 * np.std(samples)


def test_stereo_files_are_mixed_down_and_resampled(tmp_path):
    t = np.arange(44_100) / 44_100
    left, right = np.sin(2 * np.pi * 440 * t), 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "stereo.wav", 0.5 * np.stack([left, right], axis=1), 44_100)
    samples = audio.read_audio(tmp_path / "stereo.wav")
    assert len(samples) == SECOND
    spectrum = np.abs(np.fft.rfft(samples / 32768)) / (SECOND / 2)
    assert np.argmax(spectrum) == 440  # 1 s of audio: bins are 1 Hz apart
    assert spectrum[440] == pytest.approx(0.5 * 0.75, rel=0.01)


def test_offset_and_duration_select_a_part(tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(2.0), SECOND)
    whole = audio.read_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(
        audio.read_audio(tmp_path / "a.wav", 0.5, 1.0), whole[8_000:24_000]
    )
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "a.wav", 1.5), whole[24_000:])


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_decoding_in_blocks_gives_the_same_samples(tmp_path, monkeypatch, rate):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", rng.normal(0, 0.1, (round(5.3 * rate), 2)), rate)
    whole = audio.read_audio(tmp_path / "long.wav", 0.25, 4.5)
    monkeypatch.setattr(audio_files, "BLOCK", 30_000)
    blocks = audio.read_audio(tmp_path / "long.wav", 0.25, 4.5)
    assert len(blocks) == 72_000
    np.testing.assert_array_equal(blocks, whole)


@pytest.mark.parametrize("padding", audio.PADDINGS)
@pytest.mark.parametrize("samples", [100, 16_000, 16_100, 47_999, 48_000, 48_159, 50_000])
def test_windows_match_the_padded_recording(samples, padding):
    """The reference pads and reflects the whole recording first."""
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
        np.testing.assert_array_equal(
            windows[i], whole[i * SECOND : (i + 1) * SECOND + 2 * audio.CONTEXT]
        )
        np.testing.assert_array_equal(spec.windows(recording, i, i + 1)[0], windows[i])


def test_to_int16_rounds_and_clips():
    samples = np.array([0.0, 0.5, -1.0, 1.0, -3.0, 1.4 / 32768, 1.6 / 32768])
    assert audio.to_int16(samples).tolist() == [0, 16384, -32768, 32767, -32768, 1, 2]


def write_nan(path):
    soundfile.write(path, np.array([0.0, np.nan, 0.1], np.float32), SECOND, subtype="FLOAT")


@pytest.mark.parametrize(
    ("write", "offset", "message"),
    [
        (lambda path: None, 0.0, "no such audio file"),
        (
            lambda path: path.write_bytes(b"these are words, not samples"),
            0.0,
            "not readable as audio",
        ),
        (lambda path: soundfile.write(path, np.zeros(0), SECOND), 0.0, "contains no samples"),
        (
            lambda path: soundfile.write(path, speech_like(1.0), SECOND),
            2.5,
            r"offset 2.5 s is after the end of the file \(1.00 s\)",
        ),
        (write_nan, 0.0, "contains NaN or infinite samples"),
    ],
)
def test_bad_files_are_reported_in_one_line(tmp_path, write, offset, message):
    path = tmp_path / "bad.wav"
    write(path)
    with pytest.raises(audio.AudioError, match=message) as raised:
        audio.read_audio(path, offset)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


# ---- Windows


@pytest.mark.parametrize(
    ("samples", "windows"),
    [
        (1, 1),
        (SECOND, 1),
        (30 * SECOND, 1),
        (30 * SECOND + 159, 1),
        (30 * SECOND + 160, 2),
        (60 * SECOND, 2),
        (300 * SECOND, 10),
    ],
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
    windows, valid = audio.WindowSpec(padding=padding).cut(
        np.zeros(round(seconds * SECOND), np.int16)
    )
    assert windows.shape == (len(frames), 480_400)
    assert windows.dtype == np.int16
    assert valid.tolist() == frames


def test_windows_include_context_of_their_neighbors():
    samples = np.arange(3 * SECOND, dtype=np.int16)
    windows, _ = audio.WindowSpec(frames=100).cut(samples)
    assert windows.shape == (3, SECOND + 400)
    np.testing.assert_array_equal(windows[1], samples[SECOND - 200 : 2 * SECOND + 200])
    # Reflected at the start and at the end of the recording.
    np.testing.assert_array_equal(windows[0, :200], samples[200:0:-1])
    np.testing.assert_array_equal(windows[2, -200:], samples[-2:-202:-1])


def test_unknown_padding():
    with pytest.raises(UserError, match="audio padding 'zeros' is not one of released, whisper"):
        audio.WindowSpec(padding="zeros")
