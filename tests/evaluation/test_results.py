"""Predictions on disk: scores checked by hand, and runs that resume."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import judge, plots, results

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
        "leaderboard_wer": 16.6667,
    },
    "asr-ko": {"wer": 20.0, "cer": 7.1429},
    "ast": {"bleu": 84.0896, "chrf": 79.7024, "chrf_pp": 66.0268},
    "ssum": {"rouge1": 0.8333, "rouge2": 0.25, "rougeL": 0.4583},
    "sqqa": {"em": 66.6667, "f1": 88.8889},
}


def test_score_only_gives_the_hand_checked_scores(tmp_path):
    command = ["eval.py", "--score_only", f"--workdir={tmp_path}", f"--predictions={HAND_CHECKED}"]
    command += ["--eval_results=librispeech_clean_wer=hand_checked"]
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
    written = (tmp_path / "eval/.eval_results/open_asr_leaderboard.yaml").read_text()
    assert "task_id: librispeech_clean_wer\n  value: 16.67\n" in written
    assert (tmp_path / "eval/eval.png").stat().st_size > 10_000


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


GOOD = {
    "task": "asr",
    "lang": "en",
    "seconds": 2.0,
    "reference": "one",
    "hypothesis": "one",
    "stop_reason": "eos",
}
PREDICTIONS = results.read_predictions(HAND_CHECKED)[7:]


def test_a_stopped_run_resumes(tmp_path):
    run = {"checkpoint": 3, "span": "none"}
    first = results.PredictionLog(tmp_path, run)
    for prediction in PREDICTIONS[:2]:
        first.add(prediction)
    with open(tmp_path / "predictions.part.jsonl", "a") as file:
        file.write('{"id": "to')  # killed during a write
    first.close()
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
        ('{"task": "asr"}\n', "x.jsonl:1: 'lang' is missing"),
        ("\n[]\n", r"x.jsonl:2: the content is \[\], should be a valid dictionary"),
        ("{", "x.jsonl:1: not JSON"),
        (b"\xff", "x.jsonl:1: not UTF-8 text"),
        ({"hypothesis": None}, "x.jsonl:1: hypothesis is null, should be a valid string"),
        ({"hypothesis": 5}, "x.jsonl:1: hypothesis is 5, should be a valid string"),
        ({"reference": ["a"]}, "x.jsonl:1: reference is .*, should be a valid string"),
        ({"seconds": None}, "x.jsonl:1: seconds is null, should be a valid number"),
        ({"seconds": "2"}, 'x.jsonl:1: seconds is "2", should be a valid number'),
        ({"seconds": 0}, "x.jsonl:1: seconds is 0, should be greater than"),
        ({"covered_seconds": -1}, "x.jsonl:1: covered_seconds is -1, should be greater than"),
        ({"task": "stt"}, "x.jsonl:1: task is .*, should be 'asr', 'ast', 'ssum' or 'sqqa'"),
        ({"task": ["asr"]}, "x.jsonl:1: task is .*, should be 'asr'"),
        ({"lang": "../../x"}, "x.jsonl:1: lang is .*, should be a language code"),
        ({"id": [1]}, "x.jsonl:1: id is .*, should be a valid string"),
    ],
)
def test_files_without_predictions(tmp_path, content, message):
    if isinstance(content, dict):
        content = json.dumps(GOOD | content)
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        results.read_predictions(tmp_path / "x.jsonl")


def test_null_is_absent_and_other_fields_are_kept(tmp_path):
    line = GOOD | {"id": 7, "lang": "zh-CN", "covered_seconds": None, "model": {"name": "other"}}
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    (read,) = results.read_predictions(tmp_path / "x.jsonl")
    assert read == GOOD | {"id": "7", "lang": "zh", "model": {"name": "other"}}


def test_ids_of_predictions_differ(tmp_path):
    lines = [GOOD | {"id": "a"}, GOOD, GOOD, GOOD | {"id": "a"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"x.jsonl:4: the id 'a' is already used in line 1"):
        results.read_predictions(tmp_path / "x.jsonl")


# ---- Predictions are not lost


def finished(folder, run, count=3):
    log = results.PredictionLog(folder, run)
    log.finish(PREDICTIONS[:count], {"run": run}, None)


IDS = [p["id"] for p in PREDICTIONS]
RUN = {"checkpoint": 3, "manifest_sha256": "a"}


@pytest.mark.parametrize(
    ("run", "ids", "lost"),
    [
        (RUN | {"manifest_sha256": "b"}, IDS, 3),
        (RUN | {"manifest_sha256": "b"}, None, 3),
        ({"checkpoint": 3}, IDS, 3),
        (RUN, IDS[:1], 2),  # --limit=1
        (RUN | {"checkpoint": 4}, IDS[:1], 2),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_predictions_of_another_manifest_are_kept(tmp_path, run, ids, lost, is_finished):
    if is_finished:
        finished(tmp_path, RUN)
    else:
        log = results.PredictionLog(tmp_path, RUN)
        for prediction in PREDICTIONS:
            log.add(prediction)
        log.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"has 3 predictions, .* remove {lost}: .* --overwrite$"):
        results.PredictionLog(tmp_path, run, ids)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    log = results.PredictionLog(tmp_path, run, ids, overwrite=True)
    assert log.known == ({p["id"]: p for p in PREDICTIONS} if run == RUN else {})
    log.finish(PREDICTIONS[:1], {"run": run}, None)
    assert lines_of(tmp_path / "predictions.jsonl") == PREDICTIONS[:1]


def test_more_utterances_and_other_checkpoints_are_no_loss(tmp_path):
    finished(tmp_path, RUN, count=2)
    more = results.PredictionLog(tmp_path, RUN, IDS)
    assert list(more.known) == IDS[:2]
    more.finish(PREDICTIONS, {"run": RUN}, None)
    assert results.PredictionLog(tmp_path, RUN | {"checkpoint": 4}, IDS).known == {}


def test_a_stop_before_the_first_prediction_keeps_measurements(tmp_path):
    log = results.PredictionLog(tmp_path, RUN)
    scores = log.finish(PREDICTIONS, {"run_seconds": 2.5, "run": RUN}, None)
    for run in (RUN, RUN | {"checkpoint": 4}, RUN):
        results.PredictionLog(tmp_path, run, IDS).close()
    again = results.PredictionLog(tmp_path, RUN, IDS)
    assert again.finish(PREDICTIONS, {"run_seconds": 0.1, "run": RUN}, None) == scores


def test_one_evaluation_at_a_time(tmp_path):
    first = results.PredictionLog(tmp_path, RUN)
    with pytest.raises(UserError, match="another process is evaluating there; wait for it"):
        results.PredictionLog(tmp_path, RUN)
    first.finish(PREDICTIONS, {"run": RUN}, None)
    assert list(results.PredictionLog(tmp_path, RUN).known) == IDS


def test_a_file_does_not_take_the_name_of_an_evaluated_set(tmp_path):
    finished(tmp_path / "eval/test/sqqa", RUN)
    (tmp_path / "test.jsonl").write_text(json.dumps(GOOD | {"task": "sqqa"}))
    with pytest.raises(UserError, match="test/sqqa: has the predictions of an evaluated set"):
        results.score_file(tmp_path / "eval", tmp_path / "test.jsonl")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "a\0", "a\n"])
def test_names_of_sets_are_names_of_folders(tmp_path, name):
    with pytest.raises(UserError, match="a name of a set is the name of a folder"):
        results.set_folder(tmp_path, name)


def test_a_set_name(tmp_path):
    assert results.set_folder(tmp_path, "안녕 1.0") == tmp_path / "안녕 1.0"


class SilentJudge(judge.Judge):
    def score(self, predictions):
        raise judge.JudgeError("http://x: answered 500")


def test_a_judge_that_fails_does_not_cost_scores(tmp_path, caplog):
    log = results.PredictionLog(tmp_path, RUN)
    scores = log.finish(PREDICTIONS, {"run": RUN}, SilentJudge("http://x", "m"))
    assert scores["failed"] == {"judge": "http://x: answered 500"}
    assert scores["em"] == 66.6667
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores
    assert f"{tmp_path}: no judge (http://x: answered 500)" in caplog.text
    assert "judge failed" in plots.table([("test", "sqqa", scores)])


@pytest.mark.parametrize("content", ["", "[]", '{"run": 5}', "\0"])
def test_damaged_metrics(tmp_path, content):
    finished(tmp_path / "test/sqqa", RUN)
    (tmp_path / "test/sqqa/metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"test/sqqa/metrics.json: "):
        results.score_again(tmp_path)


def test_nothing_to_score(tmp_path):
    with pytest.raises(UserError, match="contains no SET/TASK"):
        results.score_again(tmp_path)
