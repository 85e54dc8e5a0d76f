"""Manifests: what a line gives, and for every kind of bad line a message with its file and number."""

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


def test_the_shortest_line_has_defaults(folder):
    path = write(folder, GOOD)
    assert read_manifest(path) == [
        Utterance(
            path=str(folder / "a.wav"), offset=0.0, seconds=1.5, task="asr", instruction=None, answer="hello", text="hello",
            lang="en", speaker="", recording="a.wav", id=f"{path}:1",
        )
    ]  # fmt: skip


def test_a_full_line(folder):
    line = GOOD | {
        "offset": 0.25, "duration": 1.0, "task": "ast", "prompt": "Into Korean.", "answer": "안녕하세요", "lang": "ko",
        "speaker": 7, "recording": "tape 3", "id": "u1",
    }  # fmt: skip
    (utterance,) = read_manifest(write(folder, line))
    assert (utterance.task, utterance.instruction, utterance.answer) == (
        "ast",
        "Into Korean.",
        "안녕하세요",
    )
    assert (utterance.text, utterance.lang) == ("hello", "ko")
    assert (utterance.speaker, utterance.recording, utterance.id) == ("7", "tape 3", "u1")
    assert (utterance.offset, utterance.seconds, utterance.num_samples) == (0.25, 1.0, 16_000)


def test_tasks_select_lines_and_empty_lines_are_nothing(folder):
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


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio_filepath": "a.wav", ', r"not JSON \("),
        ("[1, 2]", "not a JSON object"),
        (
            without("audio_filepath"),
            "no 'audio_filepath'; a line has at least audio_filepath, duration, text",
        ),
        (without("duration"), "no 'duration'; a line has at least"),
        (without("text"), "no 'text'; a line has at least"),
        (GOOD | {"audio_filepath": "../a.wav"}, r"\.\./a\.wav lies outside the manifest's folder"),
        (
            GOOD | {"audio_filepath": "/etc/passwd"},
            "/etc/passwd lies outside the manifest's folder",
        ),
        (GOOD | {"audio_filepath": 5}, "audio_filepath 5 is not text"),
        (GOOD | {"task": "vqa"}, "task 'vqa' is not one of asr, ast, ssum, sqqa"),
        (GOOD | {"duration": "long"}, "duration 'long' is not a number of seconds"),
        (GOOD | {"duration": None}, "duration None is not a number of seconds"),
        (GOOD | {"duration": 0}, r"duration 0\.0 or offset 0\.0 is not possible"),
        (GOOD | {"duration": -1}, r"duration -1\.0 or offset"),
        (GOOD | {"duration": float("inf")}, "duration inf or offset"),
        (GOOD | {"offset": -0.5}, r"duration 1\.5 or offset -0\.5 is not possible"),
        (GOOD | {"offset": float("nan")}, r"duration 1\.5 or offset nan is not possible"),
        (GOOD | {"offset": "start"}, "offset 'start' is not a number of seconds"),
        (GOOD | {"text": " "}, "the answer is empty"),
        (GOOD | {"answer": ""}, "the answer is empty"),
        (GOOD | {"text": None}, "text None is not text"),
        (GOOD | {"answer": 9}, "answer 9 is not text"),
        (GOOD | {"prompt": ["a"]}, r"prompt \['a'\] is not text"),
    ],
)
def test_bad_lines_are_named(folder, line, message):
    path = write(folder, GOOD, "", line)
    with pytest.raises(ManifestError, match=f"^{path}:3: {message}") as raised:
        read_manifest(path)
    assert "\n" not in str(raised.value)


def test_missing_files_are_named(folder):
    with pytest.raises(ManifestError, match=r"nothing\.jsonl: no such manifest"):
        read_manifest(folder / "nothing.jsonl")
    with pytest.raises(ManifestError, match=rf"train\.jsonl: audio file {folder}/b.wav is missing"):
        read_manifest(write(folder, GOOD, GOOD | {"audio_filepath": "b.wav"}))
    with pytest.raises(ManifestError, match=r"train\.jsonl: no utterances$"):
        read_manifest(write(folder))


def test_text_that_is_not_utf_8_is_named(folder):
    (folder / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ManifestError, match=r"train\.jsonl: not UTF-8"):
        read_manifest(folder / "train.jsonl")


def test_line_separators_inside_text_do_not_end_a_line(folder):
    """JSON allows U+2028 in a string; only a newline ends a line."""
    (utterance,) = read_manifest(
        write(folder, json.dumps(GOOD | {"text": "one\u2028two"}, ensure_ascii=False))
    )
    assert utterance.answer == "one\u2028two"
