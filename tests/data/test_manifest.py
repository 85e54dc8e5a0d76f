"""Manifests: defaults and fields of a line, and messages with file and line for bad lines."""

import json

import numpy as np
import pytest
import soundfile

from fastslm_jax.data.manifest import ManifestError, Utterance, read_manifest

GOOD = {"audio_filepath": "a.wav", "duration": 1.5, "text": "hello"}


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(24_000), 16_000)
    return tmp_path


def write(folder, *lines) -> str:
    path = folder / "train.jsonl"
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return str(path)


def test_optional_fields_have_defaults(folder):
    path = write(folder, GOOD)
    assert read_manifest(path) == [
        Utterance(
            path=str(folder / "a.wav"),
            offset=0.0,
            seconds=1.5,
            task="asr",
            instruction=None,
            answer="hello",
            text="hello",
            lang="en",
            speaker="",
            recording="a.wav",
            id=f"{path}:1",
        )
    ]


def test_a_line_with_all_fields(folder):
    line = GOOD | {
        "offset": 0.25,
        "duration": 1.0,
        "task": "ast",
        "prompt": "Into Korean.",
        "answer": "안녕하세요",
        "lang": "ko",
        "speaker": 7,
        "recording": "tape 3",
        "id": "u1",
    }
    (utterance,) = read_manifest(write(folder, line))
    assert (utterance.task, utterance.instruction) == ("ast", "Into Korean.")
    assert utterance.answer == "안녕하세요"
    assert (utterance.text, utterance.lang) == ("hello", "ko")
    assert (utterance.speaker, utterance.recording, utterance.id) == ("7", "tape 3", "u1")
    assert (utterance.offset, utterance.seconds, utterance.num_samples) == (0.25, 1.0, 16_000)


def test_tasks_select_lines_and_empty_lines_are_ignored(folder):
    lines = [
        GOOD | {"id": "1"},
        "",
        GOOD | {"id": "2", "task": "ssum"},
        "   ",
        GOOD | {"id": "3", "task": "sqqa"},
    ]
    path = write(folder, *lines)
    assert [u.id for u in read_manifest(path)] == ["1", "2", "3"]
    assert [u.id for u in read_manifest(path, ("ssum", "sqqa"))] == ["2", "3"]
    with pytest.raises(ManifestError, match=r"train\.jsonl: no utterances of task ast$"):
        read_manifest(path, ("ast",))


def good_without(key):
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio_filepath": "a.wav", ', r"not JSON \("),
        ("[1, 2]", "not a JSON object"),
        (
            good_without("audio_filepath"),
            "'audio_filepath' is missing; required: audio_filepath, duration, text",
        ),
        (good_without("duration"), "'duration' is missing; required:"),
        (good_without("text"), "'text' is missing; required:"),
        (GOOD | {"audio_filepath": "../a.wav"}, r"\.\./a\.wav is outside the manifest's folder"),
        (
            GOOD | {"audio_filepath": "/etc/passwd"},
            "/etc/passwd is outside the manifest's folder",
        ),
        (GOOD | {"audio_filepath": 5}, "audio_filepath 5 is not text"),
        (GOOD | {"task": "vqa"}, "task 'vqa' is not one of asr, ast, ssum, sqqa"),
        (GOOD | {"duration": "long"}, "duration 'long' is not a number of seconds"),
        (GOOD | {"duration": None}, "duration None is not a number of seconds"),
        (GOOD | {"duration": 0}, r"duration 0\.0 or offset 0\.0 is out of range"),
        (GOOD | {"duration": -1}, r"duration -1\.0 or offset"),
        (GOOD | {"duration": float("inf")}, "duration inf or offset"),
        (GOOD | {"offset": -0.5}, r"duration 1\.5 or offset -0\.5 is out of range"),
        (GOOD | {"offset": float("nan")}, r"duration 1\.5 or offset nan is out of range"),
        (GOOD | {"offset": "start"}, "offset 'start' is not a number of seconds"),
        (GOOD | {"text": " "}, "the answer is empty"),
        (GOOD | {"answer": ""}, "the answer is empty"),
        (GOOD | {"text": None}, "text None is not text"),
        (GOOD | {"answer": 9}, "answer 9 is not text"),
        (GOOD | {"prompt": ["a"]}, r"prompt \['a'\] is not text"),
    ],
)
def test_bad_lines_are_reported_with_file_and_line(folder, line, message):
    path = write(folder, GOOD, "", line)
    with pytest.raises(ManifestError, match=f"^{path}:3: {message}") as raised:
        read_manifest(path)
    assert "\n" not in str(raised.value)


def test_missing_manifests_audio_files_and_utterances(folder):
    with pytest.raises(ManifestError, match=r"nothing\.jsonl: no such manifest"):
        read_manifest(folder / "nothing.jsonl")
    with pytest.raises(ManifestError, match=rf"train\.jsonl: audio file {folder}/b.wav is missing"):
        read_manifest(write(folder, GOOD, GOOD | {"audio_filepath": "b.wav"}))
    with pytest.raises(ManifestError, match=r"train\.jsonl: no utterances$"):
        read_manifest(write(folder))


def test_a_manifest_must_be_utf_8(folder):
    (folder / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ManifestError, match=r"train\.jsonl: not UTF-8"):
        read_manifest(folder / "train.jsonl")


def test_only_newlines_end_a_line(folder):
    """JSON strings may contain U+2028, which str.splitlines would split at."""
    (utterance,) = read_manifest(
        write(folder, json.dumps(GOOD | {"text": "one\u2028two"}, ensure_ascii=False))
    )
    assert utterance.answer == "one\u2028two"
