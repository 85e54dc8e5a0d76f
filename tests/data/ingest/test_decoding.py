"""Audio of manifests: an import and training on the manifest itself use the same checks."""

import json

import numpy as np
import pytest
import soundfile
from made_audio import FORMATS, SECONDS, sound
from signals import SECOND, noise

from fastslm_jax.audio import AudioError
from fastslm_jax.data.ingest import decoding
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.manifest import read_clip, read_manifest


def clip_of(folder, **fields) -> np.ndarray:
    """The audio of a manifest with one line."""
    line = {"audio_filepath": "a.wav", "duration": 1.0, "text": "one two", **fields}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    return read_clip(read_manifest(folder / "train.jsonl")[0])


@pytest.mark.parametrize(
    "name", ["a.m4a", "longer video.mp4", "a.webm", "opus.opus", "size 0.wav", "no length.mp3"]
)
def test_a_manifest_and_its_import_give_the_same_audio(name, write_manifest, tmp_path):
    """Speech at 44.1 or 48 kHz survives compression and resampling."""
    (tmp_path / name).write_bytes(FORMATS[name]())
    line = {"audio_filepath": name, "offset": 0.25, "duration": 1.5, "text": "some words"}
    spec = write_manifest(tmp_path, [line])
    clip = read_clip(read_manifest(tmp_path / "train.jsonl")[0])
    import_corpus(spec, tmp_path / "out")
    np.testing.assert_array_equal(read_clip(read_manifest(tmp_path / "out")[0]), clip)
    assert len(clip) == 1.5 * SECOND
    expected = np.abs(np.fft.rfft(sound()[SECOND // 4 : SECOND * 7 // 4, 0]))
    assert np.corrcoef(np.abs(np.fft.rfft(clip)), expected)[0, 1] > 0.95


def test_content_in_memory_is_decoded_like_a_file(tmp_path):
    content = FORMATS["44.1 kHz stereo.wav"]()
    (tmp_path / "a.wav").write_bytes(content)
    arguments = {"is_whole": True, "tolerance": 0.1}
    samples = decoding.decode(content, 0.0, SECONDS, **arguments)
    assert len(samples) == SECONDS * SECOND
    from_path = decoding.decode(str(tmp_path / "a.wav"), 0.0, SECONDS, **arguments)
    np.testing.assert_array_equal(samples, from_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"duration": 1.0}, "the file is 3.00 s long, the manifest says 1.00 s"),
        ({"duration": 2.8}, "the file is 3.00 s long, the manifest says 2.80 s"),
        ({"duration": 1.0, "offset": None}, "the file is 3.00 s long, the manifest says 1.00 s"),
        ({"duration": 3.2}, "the file is 3.00 s long, the manifest says 3.20 s"),
        (
            {"duration": 1.0, "offset": 2.5},
            "the file is 3.00 s long, the manifest says 2.50 s to 3.50 s",
        ),
        ({"offset": 5.0}, r"offset 5.0 s is after the end of the file \(3.00 s\)"),
    ],
)
def test_durations_must_be_those_of_the_file(tmp_path, fields, message):
    soundfile.write(tmp_path / "a.wav", noise(3.0), SECOND)
    with pytest.raises(AudioError, match=f"a.wav: {message}") as error:
        clip_of(tmp_path, **fields)
    assert error.value.kind == "duration_mismatch"


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"duration": 1.0, "offset": 0.0}, 1.0),  # a part of the file, because it has an offset
        ({"duration": 1.0, "offset": 2.0}, 1.0),
        ({"duration": 2.95}, 2.95),  # rounded
        ({"duration": 3.05}, 3.05),
    ],
)
def test_clips_have_the_length_of_the_manifest(tmp_path, fields, seconds):
    samples = noise(3.0)
    soundfile.write(tmp_path / "a.wav", samples, SECOND)
    clip = clip_of(tmp_path, **fields)
    assert len(clip) == round(seconds * SECOND)
    start = round(fields.get("offset", 0) * SECOND)
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    np.testing.assert_array_equal(clip[: len(whole) - start], whole[start : start + len(clip)])


@pytest.mark.parametrize(
    ("samples", "kind"),
    [
        (np.zeros(SECOND), "silent"),
        (np.outer(noise(1.0), [1, -1]), "opposite_phase"),
        (np.append(noise(1.0)[1:], np.nan), "not_finite"),
        (32767 * noise(1.0), "out_of_range"),
    ],
)
def test_audio_that_an_import_rejects_is_an_error_without_import(tmp_path, samples, kind):
    soundfile.write(tmp_path / "a.wav", samples, SECOND, subtype="FLOAT")
    with pytest.raises(decoding.Rejected) as rejected:
        decoding.decode(str(tmp_path / "a.wav"), 0.0, 1.0, is_whole=True, tolerance=0.1)
    with pytest.raises(AudioError) as error:
        clip_of(tmp_path)
    assert rejected.value.kind == error.value.kind == kind
    assert str(error.value) == f"{tmp_path / 'a.wav'}: {rejected.value}"
