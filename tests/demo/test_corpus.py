"""The synthetic corpus on disk: manifests and audio files, resumable and reproducible."""

import hashlib
import itertools
import json
import pathlib
import subprocess
import sys

import pytest
import soundfile

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import examples, recordings, voices
from fastslm_jax.demo.corpus import DEFAULT_COUNTS, TRANSCRIPTS, build_corpus
from fastslm_jax.synthesis.augment import Augmentation

COUNTS = {
    "train": {"asr": 12, "ast": 14, "ssum": 6, "sqqa": 6},
    "dev": dict.fromkeys(TASKS, 2),
    "test": dict.fromkeys(TASKS, 3),
    "test_unseen_voices": {"asr": 3},
    "test_long": {"asr": 2},
}


def _digests(out: pathlib.Path) -> dict[str, str]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def _rows(out: pathlib.Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("corpus") / "one"
    build_corpus(out, seed=3, counts=COUNTS, workers=1, train=Augmentation(0.3, 0.3, 0.3, 0.3))
    return out


def test_transcripts_of_notes_and_questions_share_their_audio(corpus):
    spoken = {
        row["audio_filepath"]: row
        for row in _rows(corpus, "train")
        if row["task"] in ("ssum", "sqqa")
    }
    rows = [json.loads(line) for line in (corpus / TRANSCRIPTS).read_text().splitlines()]
    assert {row["audio_filepath"] for row in rows} == set(spoken)
    for row in rows:
        assert (row["task"], row["lang"], row["prompt"]) == ("asr", "en", TASKS["asr"].instruction)
        assert row["answer"] == row["text"] == spoken[row["audio_filepath"]]["text"]
        assert row["id"] == f"{spoken[row['audio_filepath']]['id']}-asr"


def test_manifests_describe_the_files(corpus):
    train, held_out = ({voice.speaker for voice in group} for group in voices.voices())
    sizes = {}
    for name in DEFAULT_COUNTS:
        rows = _rows(corpus, name)
        sizes[name] = {task: sum(row["task"] == task for row in rows) for task in COUNTS[name]}
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            samples, rate = soundfile.read(corpus / row["audio_filepath"], dtype="int16")
            assert (rate, samples.ndim) == (16_000, 1)
            assert row["duration"] == len(samples) / rate
            assert row["prompt"] == TASKS[row["task"]].instruction
            assert row["speaker"] in (held_out if name == "test_unseen_voices" else train)
            assert 0.09 * 32768 < abs(samples.astype(int)).max() < 0.72 * 32768  # -20 to -3 dBFS
            if name != "test_long":
                assert 1.0 < row["duration"] <= recordings.MAX_SECONDS[row["task"]]
                assert examples.split_of(row["text"]) == name.split("_")[0]
    assert sizes == COUNTS


def test_translations_share_the_audio_of_their_sentence(corpus):
    rows = {row["id"]: row for row in _rows(corpus, "train")}
    shared, own = rows["train-ast-000011"], rows["train-ast-000012"]
    different = {key for key, value in shared.items() if value != rows["train-asr-000011"][key]}
    assert different == {"id", "task", "prompt", "answer", "lang"}
    assert shared["lang"] == "ko"
    assert own["audio_filepath"] == "train/train-ast-000012.flac"


def test_long_recordings_have_segments(corpus):
    rows = _rows(corpus, "test_long")
    assert 60.0 <= rows[0]["duration"] <= 67.0
    assert 173.0 <= rows[1]["duration"] <= 180.0
    for row in rows:
        segments = row["segments"]
        assert row["text"] == " ".join(segment["text"] for segment in segments)
        assert all(0.199 <= b["start"] - a["end"] <= 0.601 for a, b in itertools.pairwise(segments))
        assert segments[-1]["end"] < row["duration"]
        assert {examples.split_of(segment["text"]) for segment in segments} == {"test"}


def test_two_workers_write_the_same_bytes_and_resume(corpus, tmp_path, capsys):
    expected = _digests(corpus)
    arguments = {
        "seed": 3,
        "counts": COUNTS,
        "workers": 2,
        "train": Augmentation(0.3, 0.3, 0.3, 0.3),
    }
    build_corpus(tmp_path, **arguments)
    assert _digests(tmp_path) == expected
    (tmp_path / "train/train-asr-000005.flac").unlink()
    (tmp_path / "test/test-ssum-000001.flac").unlink()
    (tmp_path / "dev.jsonl").unlink()
    # What a killed run leaves behind.
    (tmp_path / "train/.train-asr-000005.flac.tmp").write_bytes(b"half a fi")
    build_corpus(tmp_path, **{**arguments, "workers": 1})
    assert _digests(tmp_path) == expected
    capsys.readouterr()
    build_corpus(tmp_path, **arguments)
    assert "complete" in capsys.readouterr().out


def test_a_corpus_with_other_settings_is_rejected(corpus):
    with pytest.raises(ValueError, match=r"other settings.*seed"):
        build_corpus(corpus, seed=4, counts=COUNTS, train=Augmentation(0.3, 0.3, 0.3, 0.3))
    with pytest.raises(ValueError, match="no examples of task 'ast' in set 'test_long'"):
        build_corpus(corpus, counts={"test_long": {"ast": 1}})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--out=/proc/nothing/here"], "/proc/nothing"),
        (["--out=x", "--utterances=-1"], "utterances"),
        ([], "out"),
        (["--out=x", "y"], "'y'"),
    ],
)
def test_bad_flags_give_one_line_and_exit_2(flags, expected, tmp_path):
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "fastslm_jax.demo.corpus", *flags],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
