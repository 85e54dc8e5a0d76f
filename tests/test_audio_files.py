"""Audio files of all formats: all of it is heard, or the file is refused with the reason."""

import io
import re

import av
import made_audio
import numpy as np
import pytest
import soundfile
from made_audio import FORMATS, MP3, OPUS, WAV, by_ffmpeg, by_soundfile, sound
from signals import SECOND, speech_like

from fastslm_jax import audio, audio_files


@pytest.mark.parametrize("name", FORMATS)
def test_all_of_a_file_is_heard(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMATS[name]())
    samples = audio.read_audio(path)
    expected = made_audio.seconds(name)
    padding = 0.05 if name.endswith((".wav", ".flac", ".aiff", ".au", ".caf", ".w64")) else 0.25
    assert expected - 0.02 <= len(samples) / SECOND <= expected + padding
    assert audio.probe(path) == len(samples) / SECOND
    # Its last tenth is the speech and not silence.
    assert np.std(samples[-SECOND // 2 :]) > 0.5 * np.std(samples)


@pytest.mark.parametrize("name", ["pcm_16.wav", "a.flac", "a.rf64", "a.w64", "a.aiff", "a.au"])
def test_pcm_is_bit_exact(name):
    expected, _ = soundfile.read(io.BytesIO(FORMATS[name]()), dtype="int16")
    np.testing.assert_array_equal(audio.decode(FORMATS[name]()), expected)


@pytest.mark.parametrize(
    "name",
    [
        *("pcm_16.wav", "pcm_24.wav", "44.1 kHz stereo.wav", "size 0.wav", "a.w64", "a.caf"),
        *("a.flac", "no length.flac", "length too small.flac", "24 bit.flac"),
        *("a.mp3", "rising rate.mp3", "opus.opus", "vorbis twice.ogg", "a.m4a", "a.webm"),
    ],
)
@pytest.mark.parametrize(("offset", "duration"), [(0.0, 0.7), (0.51237, 0.4), (1.2, None)])
def test_a_part_equals_the_same_part_of_the_whole(name, offset, duration):
    """Whether its start was found by seeking or not."""
    whole = list(audio_files.read_blocks(io.BytesIO(FORMATS[name]())))
    part = list(audio_files.read_blocks(io.BytesIO(FORMATS[name]()), offset, duration))
    rate = whole[0][0]
    whole, part = (np.concatenate([b for _, b in blocks], axis=1) for blocks in (whole, part))
    start = round(offset * rate)
    stop = None if duration is None else start + round(duration * rate)
    np.testing.assert_array_equal(part, whole[:, start:stop])


@pytest.mark.parametrize(("format", "subtype"), [("FLAC", "PCM_16"), ("WAV", "PCM_24")])
def test_clips_of_long_files_are_found_by_seeking(format, subtype):
    """Ten minutes are not decoded for a clip at their end."""
    content, samples = io.BytesIO(), np.resize(sound()[:, 0], 600 * SECOND)
    soundfile.write(content, samples, SECOND, format=format, subtype=subtype)
    read = []

    class File(io.BytesIO):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    ((rate, block),) = audio_files.read_blocks(File(content.getvalue()), 590.0, 2.0)
    assert (rate, block.shape) == (SECOND, (1, 2 * SECOND))
    np.testing.assert_allclose(block[0], samples[590 * SECOND : 592 * SECOND], atol=1e-4)
    assert sum(read) < 0.1 * len(content.getvalue())


def cut(content: bytes, part: float = 0.5) -> bytes:
    return content[: round(len(content) * part)]


def floats(scale: float, value: float | None = None) -> bytes:
    content = io.BytesIO()
    samples = (speech_like(1.0) * scale).astype(np.float32)
    samples[100] = samples[100] if value is None else value
    soundfile.write(content, samples, SECOND, format="WAV", subtype="FLOAT")
    return content.getvalue()


def stereo(left: np.ndarray, right: np.ndarray, format: str = "WAV") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.stack([left, right], axis=1), SECOND, format=format)
    return content.getvalue()


SPEECH = speech_like(1.0)
HISS = 1e-3 * np.random.default_rng(0).standard_normal(SECOND)
HTML = b"<!DOCTYPE html><html><body>" + 500 * b"<p>404 Not Found</p>\n"
# name: content, kind, reason
REFUSED = {
    "empty": (b"", "zero_length", "the file is empty"),
    "no samples": (WAV("PCM_16")[:40] + bytes(4), "zero_length", "contains no samples"),
    "html": (HTML, "unreadable", "not readable as audio"),
    "html of a proxy": (HTML.decode().encode("utf-16"), "unreadable", "not readable as audio"),
    "text": (b"these are words, not samples", "unreadable", "not readable as audio"),
    "subtitles": (b"1\n00:00:01,000 --> 00:00:02,000\nhi\n\n", "unreadable", "not readable"),
    "playlist": (b"ffconcat version 1.0\nfile a.wav\n", "unreadable", "format is not supported"),
    "noise": (np.random.default_rng(0).bytes(50_000), "unreadable", "not readable as audio"),
    "cut wav": (
        cut(WAV("PCM_16")),
        "truncated",
        r"truncated \(the header says 64044 bytes, the file has 32022\)",
    ),
    "cut 24-bit wav": (cut(WAV("PCM_24")), "truncated", "truncated"),
    "cut rf64": (cut(by_soundfile("RF64", "PCM_16")), "truncated", "truncated"),
    "cut w64": (cut(by_soundfile("W64", "PCM_16")), "truncated", "truncated"),
    "cut aiff": (cut(by_soundfile("AIFF", "PCM_16")), "truncated", "truncated"),
    "cut au": (cut(by_soundfile("AU", "PCM_16")), "truncated", "truncated"),
    "cut caf": (cut(by_soundfile("CAF", "PCM_16")), "truncated", "truncated"),
    "cut sph": (cut(by_soundfile("NIST", "PCM_16")), "truncated", "header says 2.00 s"),
    "cut flac": (cut(by_soundfile("FLAC", "PCM_16")), "truncated", "truncated"),
    "cut flac without length": (cut(made_audio.flac_with_total(0)), "truncated", "truncated"),
    "cut mp3": (cut(MP3()), "truncated", "the header says 2.00 s, the file ends at 0"),
    "nine tenths of an mp3": (cut(MP3(), 0.9), "truncated", "the header says 2.00 s"),
    "cut vorbis": (cut(by_soundfile("OGG", "VORBIS")), "truncated", "does not end the Ogg stream"),
    "cut opus": (cut(OPUS()), "truncated", "does not end the Ogg stream"),
    "cut m4a": (cut(by_ffmpeg("ipod", "aac")), "truncated", "truncated"),
    "cut m4a, header first": (
        cut(by_ffmpeg("ipod", "aac", movflags="faststart")),
        "truncated",
        "truncated",
    ),
    "cut webm": (cut(by_ffmpeg("webm", "libopus", 48_000)), "truncated", "truncated"),
    "hole in an ogg": (
        made_audio.patched(OPUS(), len(OPUS()) // 3, bytes(100)),
        "truncated",
        "the header says 2.01 s, the file ends at 1",
    ),
    "hole in a flac": (
        made_audio.patched(by_soundfile("FLAC", "PCM_16"), 20_000, bytes(300)),
        "truncated",
        "truncated",
    ),
    "header after the first chunk": (
        made_audio.wav_sizes(36 + 16_000, 16_000),
        "truncated",
        "samples end at byte 16044, but 48000 bytes that are no other chunks follow",
    ),
    "only the size of the samples is old": (
        made_audio.wav_sizes(36 + 64_000, 16_000),
        "truncated",
        "samples end at byte 16044, but 48000 bytes that are no other chunks follow",
    ),
    "samples in two chunks": (
        made_audio.wav_with(after=b"data" + (64_000).to_bytes(4, "little") + WAV("PCM_16")[44:]),
        "truncated",
        "64008 bytes that are no other chunks follow",
    ),
    "two wavs": (2 * WAV("PCM_16"), "truncated", "64044 bytes that are no other chunks follow"),
    "NaN": (floats(1.0, np.nan), "not_finite", "contains NaN or infinite samples"),
    "infinity": (floats(1.0, np.inf), "not_finite", "contains NaN or infinite samples"),
    "range of int16": (floats(32767.0), "out_of_range", "full scale is 1; divide them"),
    "range of int8": (floats(127.0), "out_of_range", "full scale is 1; divide them"),
    "silence": (stereo(0 * SPEECH, 0 * SPEECH), "silent", "all 1.00 s are digital silence"),
    "opposite phase": (stereo(SPEECH, -SPEECH), "opposite_phase", "the channels cancel each other"),
    "opposite phase and hiss": (
        stereo(SPEECH + HISS, HISS - SPEECH),
        "opposite_phase",
        "the channels cancel each other",
    ),
    "nearly opposite phase": (
        stereo(SPEECH, -0.9 * SPEECH, "FLAC"),
        "opposite_phase",
        "the channels cancel each other",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(name, tmp_path, capfd):
    content, kind, reason = REFUSED[name]
    path = tmp_path / "bad.mp3"
    path.write_bytes(content)
    for read in (audio.read_audio, audio.probe):
        with pytest.raises(audio.AudioError, match=re.escape(str(path)) + ": .*" + reason) as error:
            read(path)
        assert error.value.kind == kind
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # nothing of the decoder's own messages


def test_no_message_of_the_decoder_is_printed(tmp_path, capfd):
    """Also for damage that is decoded as well as possible."""
    content = made_audio.id3(300) + MP3()[3000:]
    (tmp_path / "a.mp3").write_bytes(content)
    audio.read_audio(tmp_path / "a.mp3")
    assert capfd.readouterr() == ("", "")


def test_peaks_a_little_above_full_scale_are_clipped():
    samples = audio.decode(floats(4.0))  # a peak of 1.4
    assert 0 < np.mean(samples == 32767) < 0.05


@pytest.mark.parametrize("second", [0.0, 0.3, 1.0])
def test_other_stereo_is_mixed(second):
    """One silent channel, another loudness, or the same sound twice."""
    samples = audio.decode(stereo(SPEECH, second * SPEECH))
    expected = audio.to_int16(SPEECH * (1 + second) / 2)
    assert np.abs(samples.astype(int) - expected).max() <= 1


def test_streams_of_different_kinds_in_one_ogg_file_are_refused():
    content = by_soundfile("OGG", "VORBIS") + by_soundfile("OGG", "VORBIS", 44_100, 2)
    with pytest.raises(audio.AudioError, match="not readable as audio"):
        audio.decode(content)


def test_errors_cross_process_borders():
    """As those of Grain's workers do."""
    import pickle

    error = pickle.loads(pickle.dumps(audio.AudioError("a.wav: silent", "silent")))
    assert (str(error), error.kind) == ("a.wav: silent", "silent")


def test_tags_that_are_not_utf8_are_ignored():
    content = made_audio.id3(0)[:6] + bytes([0, 0, 0, 21])
    content += b"TIT2\0\0\0\x0b\0\0\3\xff\xfe\xe9\xe8" + bytes(6) + MP3()
    assert len(audio.decode(content)) == 2 * SECOND


def test_pyav_is_silent():
    assert av.logging.get_level() is None
