"""Imports: equal bytes with any number of processes and after interruptions; all rejections."""

import functools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import soundfile
from signals import SECOND, noise

from fastslm_jax.data.ingest import decoding, store
from fastslm_jax.data.ingest.importing import import_corpus, run_processes
from fastslm_jax.data.ingest.shards import Settings, make_shard
from fastslm_jax.data.ingest.store import StoreError
from fastslm_jax.data.manifest import read_clip, read_manifest
from fastslm_jax.errors import UserError

SETTINGS = Settings(shard_clips=5)

# ---- Good data


def test_an_imported_folder_reads_like_its_manifest(noise_corpus, imported):
    assert store.description(imported)["clips"] == 12
    before, after = read_manifest(noise_corpus.removeprefix("jsonl:")), read_manifest(imported)
    assert [u.id for u in after] == [f"u{number}" for number in range(12)]
    assert [(u.text, u.speaker, u.recording, u.task, u.lang) for u in after] == [
        (u.text, u.speaker, u.recording, u.task, u.lang) for u in before
    ]
    # mp3 and ogg files have a slightly different length.
    np.testing.assert_allclose([u.seconds for u in after], [u.seconds for u in before], atol=0.1)
    for old, new in zip(before, after, strict=True):
        clip = read_clip(new)
        assert clip.dtype == np.int16
        assert len(clip) == new.num_samples
        if new.seconds == old.seconds:
            np.testing.assert_array_equal(clip, read_clip(old))
    assert sum(new.seconds == old.seconds for old, new in zip(before, after, strict=True)) >= 6


def test_two_processes_write_the_same_bytes(noise_corpus, imported, file_contents, tmp_path):
    run = functools.partial(run_processes, workers=2)
    import_corpus(noise_corpus, tmp_path / "two", SETTINGS, run=run)
    assert file_contents(tmp_path / "two") == file_contents(imported)


def test_an_interrupted_import_resumes(noise_corpus, imported, file_contents, tmp_path):
    out = tmp_path / "out"

    def run_interrupted(job, numbers):
        """Writes the last shard completely, and the first one without its part."""
        numbers = list(numbers)
        make_shard(job, numbers[-1])
        (job.out / "shard-00000.array_record.1.tmp").write_bytes(b"half")
        shutil.copy(job.shard(numbers[-1]), job.shard(numbers[0]))
        raise KeyboardInterrupt

    written = []

    def run(job, numbers):
        for number in numbers:
            make_shard(job, number)
            written.append(number)
            yield number

    with pytest.raises(KeyboardInterrupt):
        import_corpus(noise_corpus, out, SETTINGS, run=run_interrupted)
    message = r"not a finished import \(dataset.json is missing\); run"
    with pytest.raises(StoreError, match=message):
        read_manifest(out)
    import_corpus(noise_corpus, out, SETTINGS, run=run)
    assert written == [0, 1]
    assert file_contents(out) == file_contents(imported)
    import_corpus(noise_corpus, out, SETTINGS, run=run)  # already finished
    assert written == [0, 1]


def test_a_folder_with_other_content_is_not_overwritten(noise_corpus, imported, tmp_path):
    message = "contains an import with a different shard_clips; choose another --out, or remove"
    with pytest.raises(UserError, match=message):
        import_corpus(noise_corpus, imported, Settings(shard_clips=6))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="contains other files; choose another --out"):
        import_corpus(noise_corpus, tmp_path)


# ---- Bad data


def truncate(path: pathlib.Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: round(keep * len(data))])


def write_bad_files(folder: pathlib.Path) -> None:
    for name in ("good", "cut", "short", "fast"):
        soundfile.write(folder / f"{name}.wav", noise(2.0), SECOND)
    soundfile.write(folder / "cut.flac", noise(2.0), SECOND)
    soundfile.write(folder.parent / "outside.wav", noise(2.0), SECOND)
    truncate(folder / "cut.flac", 0.5)
    truncate(folder / "cut.wav", 0.5)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "none.wav", np.zeros(0), SECOND)
    with_nan = np.append(noise(1.99), np.full(160, np.nan))
    soundfile.write(folder / "nan.wav", with_nan, SECOND, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(2 * SECOND), SECOND)
    soundfile.write(folder / "int16.wav", 32767 * noise(2.0), SECOND, subtype="FLOAT")
    soundfile.write(folder / "phase.wav", np.outer(noise(2.0), [1, -1]), SECOND)


def line(name: str, text: str = "some words", **fields) -> dict:
    return {"audio_filepath": name, "duration": 2.0, "text": text, "id": name, **fields}


# The manifest's first line is good.wav; every line after it is bad: name → (line, kind, reason).
BAD_LINES = {
    "broken line": ('{"audio_filepath": "good.wav", "dur', "broken_json", r"not JSON \("),
    "unpaired surrogate": (
        json.dumps(line("good.wav", "\ud83d", id="g")),
        "broken_json",
        "not UTF-8 text",
    ),
    "null byte in path": (line("a\0b.wav", id="h"), "bad_field", r"control character U\+0000"),
    "task": (line("good.wav", id="i", task=["asr"]), "bad_field", "task is"),
    "offset": (line("good.wav", id="j", offset=1e308), "bad_field", "offset is"),
    "language": (line("good.wav", id="k", lang="xx"), "bad_field", 'lang is "xx", should be a'),
    "digits": ('{"duration": ' + "9" * 5000 + "}", "broken_json", "more than 4300 digits"),
    "not an object": ("[1]", "broken_json", "not a JSON object"),
    "missing key": (
        {"audio_filepath": "good.wav", "text": "a"},
        "bad_field",
        "'duration' is missing",
    ),
    "outside": (line("../outside.wav"), "outside_root", "is outside the manifest's folder"),
    "missing": (line("nowhere.wav"), "missing_file", "no such audio file"),
    "unreadable": (line("text.wav"), "unreadable", "not readable as audio"),
    "truncated flac": (line("cut.flac"), "truncated", "."),
    "truncated wav": (
        line("cut.wav"),
        "truncated",
        "the header says 64044 bytes, the file has 32022",
    ),
    "empty file": (line("empty.wav"), "zero_length", "the file is empty"),
    "no samples": (line("none.wav"), "zero_length", "contains no samples"),
    "NaN": (line("nan.wav"), "not_finite", "contains NaN or infinite samples"),
    "another scale": (line("int16.wav"), "out_of_range", "full scale is 1; divide them"),
    "zeros": (line("silent.wav"), "silent", "all 2.00 s are digital silence"),
    "opposite phase": (line("phase.wav"), "opposite_phase", "the channels cancel each other"),
    "too long": (
        line("short.wav", duration=1.0),
        "duration_mismatch",
        "the file is 2.00 s long, the manifest says 1.00 s",
    ),
    "too short": (
        line("short.wav", offset=1.0),
        "duration_mismatch",
        "the file is 2.00 s long, the manifest says 1.00 s to 3.00 s",
    ),
    "no answer": (line("good.wav", "  ", id="e"), "empty_text", "the answer is empty"),
    "no transcript": (line("good.wav", "", answer="a", id="f"), "empty_text", "the text is empty"),
    "too much text": (
        line("fast.wav", "word " * 30),
        "text_rate",
        "74.50 characters per second; allowed: 0.2 to 40",
    ),
    "duplicate": (
        line("fast.wav", id="good.wav"),
        "duplicate_id",
        "the id is already used at train.jsonl:1",
    ),
}


@pytest.fixture(scope="module")
def bad_import(tmp_path_factory, write_manifest):
    """An import of one good line and all bad lines: (the folder, {line number: rejection})."""
    folder = tmp_path_factory.mktemp("bad") / "corpus"
    folder.mkdir()
    write_bad_files(folder)
    spec = write_manifest(folder, [line("good.wav"), *(bad for bad, *_ in BAD_LINES.values())])
    out = folder.parent / "out"
    import_corpus(spec, out, Settings(shard_clips=4), max_reject_fraction=1.0)
    rejections = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return out, {rejection["line"]: rejection for rejection in rejections}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_rejected_with_a_reason(bad_import, name):
    _, rejections = bad_import
    _, kind, reason = BAD_LINES[name]
    rejection = rejections[2 + list(BAD_LINES).index(name)]
    assert rejection["file"] == "train.jsonl"
    assert rejection["kind"] == kind
    assert re.search(reason, rejection["reason"]), rejection["reason"]


def test_good_lines_are_imported_and_every_kind_is_covered(bad_import):
    out, rejections = bad_import
    assert sorted(rejections) == list(range(2, 2 + len(BAD_LINES)))
    assert {rejection["kind"] for rejection in rejections.values()} == set(decoding.KINDS)
    assert [u.id for u in read_manifest(out)] == ["good.wav"]


def test_too_many_rejections_fail_the_import_until_they_are_fixed(write_manifest, tmp_path):
    for name in "abcd":
        samples = np.zeros(SECOND) if name == "b" else noise(1.0)
        soundfile.write(tmp_path / f"{name}.wav", samples, SECOND)
    lines = [{"audio_filepath": f"{name}.wav", "duration": 1.0, "text": "yes"} for name in "abcd"]
    spec = write_manifest(tmp_path, lines)
    message = (
        r"3 clips.*; 1 rejected \(1 silent\), see .*rejected.jsonl: 25.0% of 4 entries, more than "
        r"the allowed 1.0%; fix them or raise --max_reject_fraction"
    )
    with pytest.raises(UserError, match=message):
        import_corpus(spec, tmp_path / "out", Settings(shard_clips=2))
    assert not (tmp_path / "out" / "dataset.json").exists()
    soundfile.write(tmp_path / "b.wav", noise(1.0), SECOND)
    assert import_corpus(spec, tmp_path / "out", Settings(shard_clips=2))["clips"] == 4
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""
