"""Manifests: defaults and fields of a line, and messages with file and line for bad lines."""

import json

import numpy as np
import pytest
import soundfile

from fastslm_jax.data.manifest import (
    ManifestError,
    Segment,
    Utterance,
    fingerprint,
    numbered_lines,
    read_manifest,
)

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


@pytest.mark.parametrize(
    ("given", "context", "prompt"),
    [
        (
            [" Anna", "red lamps"],
            "Anna, red lamps",
            "Transcribe the audio clip into text.\nContext: Anna, red lamps",
        ),
        (
            "A talk in Vienna.\n",
            "A talk in Vienna.",
            "Transcribe the audio clip into text.\nContext: A talk in Vienna.",
        ),
        ("", "", None),
        ([], "", None),
        (None, "", None),
    ],
)
def test_context_is_added_to_the_instruction(folder, given, context, prompt):
    (utterance,) = read_manifest(write(folder, GOOD | {"context": given}))
    assert (utterance.context, utterance.prompt, utterance.answer) == (context, prompt, "hello")
    (utterance,) = read_manifest(write(folder, GOOD | {"context": given, "prompt": "Write."}))
    assert utterance.prompt == (f"Write.\nContext: {context}" if context else "Write.")


def test_a_clip_without_speech_has_no_answer(folder):
    line = GOOD | {"text": "", "no_speech": True}
    silent, spoken = read_manifest(write(folder, line | {"id": "1"}, GOOD | {"no_speech": False}))
    assert (silent.no_speech, silent.text, silent.answer) == (True, "", "")
    assert (spoken.no_speech, spoken.answer) == (False, "hello")


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
        (good_without("audio_filepath"), "'audio_filepath' is missing"),
        (good_without("duration"), "'duration' is missing"),
        (good_without("text"), "'text' is missing"),
        (GOOD | {"audio_filepath": "../a.wav"}, r"\.\./a\.wav is outside the manifest's folder"),
        (
            GOOD | {"audio_filepath": "/etc/passwd"},
            "/etc/passwd is outside the manifest's folder",
        ),
        (GOOD | {"audio_filepath": 5}, "audio_filepath is 5, should be a valid string"),
        (
            GOOD | {"audio_filepath": "a\0.wav"},
            r"audio_filepath is .*, should not contain the control character U\+0000",
        ),
        (GOOD | {"task": "vqa"}, "task is \"vqa\", should be 'asr', 'ast', 'ssum' or 'sqqa'"),
        (
            GOOD | {"task": ["asr"]},
            r"task is \[\"asr\"\], should be 'asr', 'ast', 'ssum' or 'sqqa'",
        ),
        (GOOD | {"duration": "1.5"}, 'duration is "1.5", should be a valid number'),
        (GOOD | {"duration": None}, "duration is null, should be a valid number"),
        (GOOD | {"duration": True}, "duration is true, should be a valid number"),
        (GOOD | {"duration": 0}, "duration is 0, should be greater than or equal to 0.0000625"),
        (GOOD | {"duration": -1}, "duration is -1, should be greater than"),
        (GOOD | {"duration": float("inf")}, "duration is Infinity, should be"),
        (GOOD | {"duration": 1e308}, "duration is .*, should be less than or equal to 31622400"),
        (json.dumps(GOOD).replace("1.5", "9" * 5000), "JSON with a number of more than 4300"),
        (GOOD | {"offset": -0.5}, "offset is -0.5, should be greater than or equal to 0"),
        (GOOD | {"offset": float("nan")}, "offset is NaN, should be"),
        (GOOD | {"offset": 1e308}, "offset is .*, should be less than or equal to 31622400"),
        (GOOD | {"text": " "}, "the answer is empty; a clip without speech needs no_speech: true"),
        (GOOD | {"no_speech": True}, "no_speech is true, but text or answer is not empty"),
        (
            GOOD | {"text": "", "answer": "yes", "no_speech": True},
            "no_speech is true, but text or answer is not empty",
        ),
        (GOOD | {"text": "", "no_speech": 1}, "no_speech is 1, should be a valid boolean"),
        (GOOD | {"answer": ""}, "the answer is empty"),
        (GOOD | {"text": None}, "text is null, should be a valid string"),
        (
            GOOD | {"text": "a\x1bb"},
            r"text is .*, should not contain the control character U\+001B",
        ),
        (GOOD | {"answer": 9}, "answer is 9, should be a valid string"),
        (GOOD | {"prompt": ["a"]}, r"prompt is \[\"a\"\], should be a valid string"),
        (GOOD | {"context": 5}, "context is 5, should be a text or a list of texts"),
        (GOOD | {"context": ["a", 5]}, r"context is \[\"a\", 5\], should be a text or a list of"),
        (GOOD | {"context": ["a", " "]}, r"context is .*, should not contain empty phrases"),
        (GOOD | {"context": ["a\0"]}, r"context is .*, should not contain the control character"),
        (GOOD | {"speaker": ["a"]}, r"speaker is \[\"a\"\], should be a valid string"),
        (GOOD | {"id": True}, "id is true, should be a valid string"),
        (GOOD | {"lang": "english"}, 'lang is "english", should be a language code such as en'),
        (GOOD | {"lang": "../../x"}, 'lang is "../../x", should be a language code such as en'),
        ('{"text": "a", "text": "b"}', "JSON with two values for 'text'"),
        ('{"a":' * 200_000, "JSON that is nested too deeply"),
    ],
)
def test_bad_lines_are_reported_with_file_and_line(folder, line, message):
    path = write(folder, GOOD, "", line)
    with pytest.raises(ManifestError, match=f"^{path}:3: {message}") as raised:
        read_manifest(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_null_is_absent(folder):
    """Data frames write null for a missing value."""
    optional = ("offset", "task", "prompt", "answer", "lang", "speaker", "recording", "id")
    path = write(folder, GOOD | dict.fromkeys([*optional, "segments"]))
    assert read_manifest(path) == read_manifest(write(folder, GOOD))


@pytest.mark.parametrize(
    ("code", "lang"), [("en-US", "en"), ("KO", "ko"), ("cmn_hans_cn", "zh"), ("yue", "yue")]
)
def test_languages_are_primary_subtags(folder, code, lang):
    (utterance,) = read_manifest(write(folder, GOOD | {"lang": code}))
    assert utterance.lang == lang


def test_ids_differ(folder):
    path = write(folder, GOOD | {"id": 7}, GOOD, "", GOOD | {"id": "7", "task": "ssum"})
    with pytest.raises(ManifestError, match=f"^{path}:4: the id '7' is already used in line 1;"):
        read_manifest(path, ("asr",))


def segments(*given) -> list[dict]:
    return [{"start": start, "end": end, "text": text} for start, end, text in given]


def test_segments_end_with_their_clip(folder):
    line = GOOD | {"segments": segments((0, 1, "hel"), (1, 1.55, "lo"))}
    (utterance,) = read_manifest(write(folder, line))
    assert utterance.segments == (Segment(0.0, 1.0, "hel"), Segment(1.0, 1.5, "lo"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (segments((0, 99, "hello")), "segments end at 99 s, the clip ends at 1.5 s"),
        (segments((0, 1, "a"), (0.5, 1, "b")), "segments overlap or are out of order"),
        (segments((1, 0.5, "a")), "segments overlap or are out of order"),
        (segments((-1, 1, "a")), r"segments\[0\].start is -1, should be greater than"),
        (segments((0, float("nan"), "a")), r"segments\[0\].end is NaN, should be"),
        (segments((0, float("inf"), "a")), r"segments\[0\].end is Infinity, should be"),
        (segments((0, 1, 5)), r"segments\[0\].text is 5, should be a valid string"),
        ([{"end": 1, "text": "a"}], r"'segments\[0\].start' is missing"),
        ({"start": 0}, "segments is .*, should be a valid tuple"),
        ([1], r"segments\[0\] is 1, should be a valid dictionary$"),
    ],
)
def test_segments_are_checked(folder, given, message):
    with pytest.raises(ManifestError, match=f"train.jsonl:1: {message}"):
        read_manifest(write(folder, GOOD | {"segments": given}))


@pytest.mark.parametrize(
    ("given", "is_covered"),
    [
        ([], True),
        (segments((0, 4, "Anna left,"), (6, 12, "EARLY!")), True),  # case and punctuation differ
        (segments((0, 4, "anna left")), False),
        (segments((0, 12, "anna left early and late")), False),
        (segments((0, 6, "anna left early")), False),  # 6 s before the end of the clip
        ([{"start": 0, "end": 12, "text": None}], False),
    ],
)
def test_segments_that_do_not_cover_their_clip_are_counted(folder, caplog, given, is_covered):
    line = GOOD | {"duration": 12.0, "text": "anna left early.", "segments": given}
    path = write(folder, GOOD, line)
    assert len(read_manifest(path)) == 2
    warned = f"{path}: 1 of 2 clips have segments without all their text" in caplog.text
    assert warned != is_covered
    assert (f"(first: {path}:2)" in caplog.text) != is_covered


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks(folder, end, mark):
    lines = [json.dumps(GOOD | {"id": name}) for name in "ab"]
    (folder / "train.jsonl").write_bytes((mark + end.join([lines[0], " ", lines[1]])).encode())
    assert [u.id for u in read_manifest(folder / "train.jsonl")] == ["a", "b"]
    found = [place[:2] for place in numbered_lines(folder / "train.jsonl")]
    first = len(mark.encode())
    assert found == [(1, first), (3, first + len(lines[0]) + 1 + 2 * len(end))]


def test_the_fingerprint_is_of_the_content(folder):
    before = fingerprint(write(folder, GOOD))
    assert fingerprint(write(folder, GOOD)) == before
    assert fingerprint(write(folder, GOOD | {"text": "bye"})) != before


def test_missing_manifests_audio_files_and_utterances(folder):
    with pytest.raises(ManifestError, match=r"nothing\.jsonl: no such manifest"):
        read_manifest(folder / "nothing.jsonl")
    with pytest.raises(ManifestError, match=rf"train\.jsonl: audio file {folder}/b.wav is missing"):
        read_manifest(write(folder, GOOD, GOOD | {"audio_filepath": "b.wav"}))
    with pytest.raises(ManifestError, match=r"train\.jsonl: no utterances$"):
        read_manifest(write(folder))


def test_a_manifest_must_be_utf_8(folder):
    (folder / "train.jsonl").write_bytes(b'\n{"text": "\xff"}\n')
    with pytest.raises(ManifestError, match=r"train\.jsonl:2: not UTF-8 text"):
        read_manifest(folder / "train.jsonl")


def test_only_newlines_end_a_line(folder):
    """JSON strings may contain U+2028, which str.splitlines would split at."""
    (utterance,) = read_manifest(
        write(folder, json.dumps(GOOD | {"text": "one\u2028two"}, ensure_ascii=False))
    )
    assert utterance.answer == "one\u2028two"
