"""Predictions on disk: scores checked by hand, and runs that resume."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import results

ROOT = pathlib.Path(__file__).parents[2]
HAND_CHECKED = ROOT / "tests/evaluation/predictions/hand_checked.jsonl"
# Computed by hand.
# English: 1 substitution and 1 deletion of 6 + 6 words (an apostrophe splits a name), 5 of 22 + 30
# characters. Korean: 1 of 2 + 3 words, 1 syllable of 8 + 6 characters.
# BLEU of 8 syllables, the last wrong: (7/8 · 6/7 · 5/6 · 4/5)^(1/4).
# chrF: the mean of 7/8, 6/7, 5/6, 4/5, 3/4, 2/3; chrF++ adds 1/2 and 0 for words and word pairs.
# ROUGE: the means of (2/3, 1), (1/2, 0), (2/3, 1/4).
# Answers: two of three are equal, the third shares one word of one and two.
EXPECTED = {
    "asr-en": {
        "wer": 16.6667,
        "cer": 9.6154,
        "substitutions": 1,
        "deletions": 1,
        "insertions": 0,
        "words": 12,
    },
    "asr-ko": {"wer": 20.0, "cer": 7.1429},
    "ast": {"bleu": 84.0896, "chrf": 79.7024, "chrf_pp": 66.0268},
    "ssum": {"rouge1": 0.8333, "rouge2": 0.25, "rougeL": 0.4583},
    "sqqa": {"em": 66.6667, "f1": 88.8889},
}


def test_score_only_gives_the_hand_checked_scores(tmp_path):
    command = ["eval.py", "--score_only", f"--workdir={tmp_path}", f"--predictions={HAND_CHECKED}"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "eval/hand_checked"
    assert {path.name for path in folder.iterdir()} == set(EXPECTED)
    for label, expected in EXPECTED.items():
        scores = json.loads((folder / label / "metrics.json").read_text())
        assert {name: scores[name] for name in expected} == expected
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if "hand_checked" in line}
    assert "wer 16.667 [" in lines["asr-en"]
    assert lines["asr-ko"].index("cer 7.143 [") < lines["asr-ko"].index("wer 20.000")
    assert (tmp_path / "eval/eval.png").stat().st_size > 10_000


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PREDICTIONS = results.read_predictions(HAND_CHECKED)[7:]


def test_a_stopped_run_resumes(tmp_path):
    run = {"checkpoint": 3, "span": "none"}
    first = results.PredictionLog(tmp_path, run)
    for prediction in PREDICTIONS[:2]:
        first.add(prediction)
    with open(tmp_path / "predictions.part.jsonl", "a") as file:
        file.write('{"id": "to')  # killed during a write
    again = results.PredictionLog(tmp_path, run)
    assert again.known == {p["id"]: p for p in PREDICTIONS[:2]}
    for prediction in PREDICTIONS[2:]:
        again.add(prediction)
    scores = again.finish(PREDICTIONS, {"device": "cpu"}, None)
    assert lines_of(tmp_path / "predictions.jsonl") == PREDICTIONS
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores
    assert (scores["em"], scores["device"]) == (66.6667, "cpu")


def test_a_finished_set_is_not_answered_again(tmp_path):
    run = {"checkpoint": 3, "span": "none"}
    first = results.PredictionLog(tmp_path, run)
    for prediction in PREDICTIONS:
        first.add(prediction)
    scores = first.finish(PREDICTIONS, {"run_seconds": 2.5, "run": run}, None)
    again = results.PredictionLog(tmp_path, run)
    assert list(again.known.values()) == PREDICTIONS
    assert again.finish(PREDICTIONS, {"run_seconds": 0.1, "run": run}, None) == scores
    assert results.PredictionLog(tmp_path, run | {"span": "30"}).known == {}


def test_other_settings_discard_predictions(tmp_path):
    results.PredictionLog(tmp_path, {"checkpoint": 3}).add(PREDICTIONS[0])
    assert results.PredictionLog(tmp_path, {"checkpoint": 4}).known == {}


def test_scoring_again_keeps_measurements(tmp_path):
    kept = results.PredictionLog(tmp_path / "test/sqqa", {})
    kept.finish(PREDICTIONS, {"run_seconds": 2.5, "device": "cpu"}, None)
    changed = [p | {"hypothesis": p["reference"]} for p in PREDICTIONS]
    (tmp_path / "test/sqqa/predictions.jsonl").write_text(
        "".join(json.dumps(p) + "\n" for p in changed)
    )
    ((name, label, scores),) = results.score_again(tmp_path)
    assert (name, label, scores["em"], scores["run_seconds"], scores["device"]) == (
        "test",
        "sqqa",
        100.0,
        2.5,
        "cpu",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file of predictions"),
        ("", "contains no predictions"),
        (
            '{"task": "asr"}\n',
            "x.jsonl:1: not a prediction; a line is a JSON object with task, lang",
        ),
        ("[]\n", "x.jsonl:1: not a prediction"),
    ],
)
def test_files_without_predictions(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        results.read_predictions(tmp_path / "x.jsonl")


def test_nothing_to_score(tmp_path):
    with pytest.raises(UserError, match="contains no SET/TASK"):
        results.score_again(tmp_path)
