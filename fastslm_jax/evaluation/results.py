"""Predictions on disk and their scores beside them: SET/TASK/{predictions.jsonl, metrics.json}."""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict
from fastslm_jax.evaluation.judge import Judge
from fastslm_jax.evaluation.plots import Rows

JUDGED = ("ssum", "sqqa")
REQUIRED = ("task", "lang", "seconds", "reference", "hypothesis", "stop_reason")
MEASURED = ("run_seconds", "device", "peak_memory_gib", "checkpoint", "run", "rtfx_by_batch")
PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"


class PredictionLog:
    """The predictions of a set and task, appended as they arrive, so that a stopped run resumes.

    The first line of FOLDER/predictions.part.jsonl contains the run's settings; predictions made
    with other settings are discarded. After a finished run, metrics.json contains its settings.

    Attributes:
        known: predictions of an earlier run with the same settings, by id.
    """

    def __init__(self, folder: pathlib.Path, run: dict):
        self.folder, self._part = folder, folder / "predictions.part.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict] = {}
        self._measured: dict = {}  # of the finished run that all predictions come from
        lines = self._part.read_text().splitlines() if self._part.exists() else []
        if lines and _parsed(lines[0]) == {"run": run}:
            found = [_parsed(line) for line in lines[1:]]
            self.known = {p["id"]: p for p in found if p}  # the last line may be incomplete
        elif not lines and (measured := self._finished(run)):
            self.known = {p["id"]: p for p in read_predictions(folder / PREDICTIONS)}
            self._measured = measured
        _write(self._part, _json_lines([{"run": run}, *self.known.values()]))

    def _finished(self, run: dict) -> dict:
        """What a finished run with the same settings has measured."""
        file = self.folder / METRICS
        if not file.exists() or not (self.folder / PREDICTIONS).exists():
            return {}
        scores = _parsed(file.read_text()) or {}
        return _measured(scores) if scores.get("run") == run else {}

    def add(self, prediction: dict) -> None:
        self._measured = {}
        with open(self._part, "a") as file:
            file.write(_json_lines([prediction]))

    def finish(self, predictions: Sequence[dict], measured: dict, judge: Judge | None) -> dict:
        """Writes predictions.jsonl and metrics.json; returns the scores."""
        _write(self.folder / PREDICTIONS, _json_lines(predictions))
        scores = _score(self.folder, predictions, measured | self._measured, judge)
        self._part.unlink()
        return scores


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _json_lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _measured(scores: dict) -> dict:
    return {name: scores[name] for name in MEASURED if name in scores}


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _score(
    folder: pathlib.Path, predictions: Sequence[dict], measured: dict, judge: Judge | None
) -> dict:
    scores = predict.summarize(predictions, intervals=True)
    if judge and predictions[0]["task"] in JUDGED:
        scores |= judge.score(predictions)
    scores |= measured
    _write(folder / METRICS, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return scores


def read_predictions(path: pathlib.Path) -> list[dict]:
    """The predictions of a JSON-lines file.

    Raises:
        UserError: the file is missing or empty, or a line is not a prediction.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions")
    predictions = []
    for number, line in enumerate(path.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        found = _parsed(line)
        if not isinstance(found, dict) or any(name not in found for name in REQUIRED):
            raise UserError(
                f"{path}:{number}: not a prediction; a line is a JSON object with "
                f"{', '.join(REQUIRED)}"
            )
        predictions.append(found)
    if not predictions:
        raise UserError(f"{path}: contains no predictions")
    return predictions


def score_file(folder: pathlib.Path, file: pathlib.Path, judge: Judge | None = None) -> Rows:
    """Scores the predictions of one file, from any model, into FOLDER/NAME/TASK."""
    rows = []
    predictions = read_predictions(file)
    for label, members in predict.groups(predictions, lambda p: (p["task"], p["lang"])).items():
        out = folder / file.stem / label
        out.mkdir(parents=True, exist_ok=True)
        rows.append((file.stem, label, _score(out, members, {}, judge)))
    return rows


def score_again(folder: pathlib.Path, judge: Judge | None = None) -> Rows:
    """Scores all predictions below a folder again; measurements of their runs are kept."""
    rows = []
    for path in sorted(folder.glob(f"*/*/{PREDICTIONS}")):
        metrics_file = path.parent / METRICS
        old = json.loads(metrics_file.read_text()) if metrics_file.exists() else {}
        scores = _score(path.parent, read_predictions(path), _measured(old), judge)
        rows.append((path.parent.parent.name, path.parent.name, scores))
    if not rows:
        raise UserError(
            f"{folder}: contains no SET/TASK/{PREDICTIONS}; run eval.py without --score_only first"
        )
    return rows
