"""Predictions on disk and their scores beside them: SET/TASK/{predictions.jsonl, metrics.json}."""

import json
import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated

import pydantic
from absl import logging

from fastslm_jax import outputs, schema
from fastslm_jax.data import fields
from fastslm_jax.data.manifest import numbered_lines
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict
from fastslm_jax.evaluation.bertscore import BertScore
from fastslm_jax.evaluation.judge import Judge, JudgeError
from fastslm_jax.evaluation.plots import Rows
from fastslm_jax.training import checkpoint

JUDGED = ("ssum", "sqqa")
BERTSCORED = ("ast", "ssum")
TEXTS = ("source", "reference", "hypothesis")  # of translations, one file each
PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"
_Positive = Annotated[float, pydantic.Field(ge=0)]


class Prediction(schema.Schema):
    """A line of a file of predictions; other fields are kept."""

    model_config = pydantic.ConfigDict(extra="allow")

    task: fields.Task
    lang: fields.Language
    seconds: fields.Length
    reference: str
    hypothesis: str
    stop_reason: str
    id: Annotated[str, pydantic.BeforeValidator(fields.number_as_text)] | None = None
    covered_seconds: _Positive | None = None
    batch_seconds: _Positive | None = None
    first_token_seconds: _Positive | None = None
    again: fields.Count | None = None
    recording: fields.Name | None = None
    speaker: fields.Name | None = None
    source: str | None = None
    parent_id: fields.Name | None = None
    chunk_index: fields.Count | None = None


class Measured(schema.Schema):
    """What a run has measured, in metrics.json: kept when its predictions are scored again."""

    run_seconds: float | None = None
    device: str | None = None
    peak_memory_gib: float | None = None
    checkpoint: int | None = None
    run: dict | None = None
    rtfx_by_batch: dict[str, float] | None = None


class PredictionLog:
    """The predictions of a set and task, appended as they arrive, so that a stopped run resumes.

    The first line of FOLDER/predictions.part.jsonl contains the run's settings; predictions made
    with other settings are discarded, but those of another manifest only if `overwrite`. After a
    finished run, metrics.json contains its settings. The folder is locked until `finish` or
    `close`.

    Args:
        run: the settings; `manifest_sha256` stands for the manifest.
        ids: of the utterances to be answered (None: unknown). Predictions of other utterances
            would be lost, and are replaced only if `overwrite`.
        overwrite: replace predictions of another manifest.

    Attributes:
        run: the settings.
        known: predictions of an earlier run with the same settings, by id.

    Raises:
        UserError: another evaluation writes there, or predictions of another manifest would be
            lost.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        run: dict,
        ids: Collection[str] | None = None,
        overwrite: bool = False,
    ):
        self.folder, self.run, self._part = folder, run, folder / "predictions.part.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = checkpoint.lock(folder, work="evaluating")
        try:
            self.known, self._measured = self._open(run, ids, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(
        self, run: dict, ids: Collection[str] | None, overwrite: bool
    ) -> tuple[dict[str, dict], dict]:
        """Starts the file of this run.

        Returns:
            Known predictions, and what the finished run that all of them come from has measured.
        """
        stopped_run, stopped = self._stopped()
        finished_run, finished = self._finished()
        if not overwrite:
            for old_run, old in ((stopped_run, stopped), (finished_run, finished)):
                self._check_loss(old_run, old, run, ids)
        known, measured = {}, {}
        if finished_run == run and (stopped_run != run or stopped.keys() <= finished.keys()):
            known, measured = finished, read_measured(self.folder / METRICS)
        elif stopped_run == run:
            known = stopped
        outputs.write_text(self._part, _json_lines([{"run": run}, *known.values()]))
        return known, measured

    def _stopped(self) -> tuple[dict | None, dict[str, dict]]:
        """Settings and predictions of a run that was stopped."""
        if not self._part.exists():
            return None, {}
        first, *lines = self._part.read_bytes().split(b"\n")
        found = [_prediction_or_none(line) for line in lines]  # the last line may be incomplete
        try:
            run = schema.parse_json(first)["run"]
        except (ValueError, LookupError, TypeError):  # the file was damaged
            run = None
        return run, {p["id"]: p for p in found if p and "id" in p}

    def _finished(self) -> tuple[dict | None, dict[str, dict]]:
        """Settings and predictions of a finished run."""
        if not (self.folder / PREDICTIONS).exists():
            return None, {}
        found = read_predictions(self.folder / PREDICTIONS)
        run = read_measured(self.folder / METRICS).get("run")
        return run, {p.get("id", number): p for number, p in enumerate(found)}

    def _check_loss(
        self, old_run: dict | None, old: dict[str, dict], run: dict, ids: Collection[str] | None
    ) -> None:
        """Raises if predictions would be lost by a run on another manifest, or on a part of it."""
        manifest = "manifest_sha256"
        is_other = bool(old) and (old_run or {}).get(manifest) != run.get(manifest)
        lost = len(old) if is_other else len(old.keys() - ids) if ids is not None else 0
        if lost:
            raise UserError(
                f"{self.folder}: has {len(old)} predictions, of which this run would remove "
                f"{lost}: they are of another manifest, or --limit leaves them out; move the "
                "folder away, or replace them with --overwrite"
            )

    def add(self, prediction: dict) -> None:
        self._measured = {}
        with open(self._part, "a", encoding="utf-8") as file:
            file.write(_json_lines([prediction]))

    def finish(
        self,
        predictions: Sequence[dict],
        measured: dict,
        judge: Judge | None,
        bertscore: BertScore | None = None,
    ) -> dict:
        """Writes predictions.jsonl and metrics.json; returns the scores."""
        outputs.write_text(self.folder / PREDICTIONS, _json_lines(predictions))
        scores = _score(self.folder, predictions, measured | self._measured, judge, bertscore)
        self._part.unlink()
        self.close()
        return scores

    def close(self) -> None:
        """Lets other processes write to the folder."""
        self._lock.close()


def read_measured(path: pathlib.Path) -> dict:
    """What a run has measured; {} if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        scores = schema.parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: {error}; remove the file") from None
    return schema.check(Measured, scores, path).model_dump(exclude_none=True)


def set_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    """FOLDER/NAME, the folder of a set.

    Raises:
        UserError: the name is not that of a folder.
    """
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise UserError(f"the set {name!r}: a name of a set is the name of a folder")
    return folder / name


def _json_lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _score(
    folder: pathlib.Path,
    predictions: Sequence[dict],
    measured: dict,
    judge: Judge | None,
    bertscore: BertScore | None,
) -> dict:
    """Writes metrics.json, and of translations the texts by line, which `comet-score` reads.

    Scores that fail are named in metrics.json and in a warning.
    """
    scores = predict.summarize(predictions, intervals=True)
    if judge and predictions[0]["task"] in JUDGED:
        try:
            scores |= judge.score(predictions)
        except JudgeError as error:
            scores["failed"] = scores.get("failed", {}) | {"judge": str(error)}
    if bertscore and predictions[0]["task"] in BERTSCORED:
        predict.add(scores, bertscore.score(predictions))
    if predictions[0]["task"] == "ast":
        for name in TEXTS:
            if all(name in p for p in predictions):
                lines = "".join(" ".join(p[name].split()) + "\n" for p in predictions)
                outputs.write_text(folder / f"{name}.txt", lines)
    scores |= measured
    outputs.write_text(folder / METRICS, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    for name, reason in scores.get("failed", {}).items():
        logging.warning("%s: no %s (%s)", folder, name, reason)
    return scores


def _prediction_or_none(line: bytes) -> dict | None:
    try:
        return _prediction(line, "")
    except UserError:
        return None


def _prediction(line: bytes, where: str) -> dict:
    try:
        found = schema.parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return schema.check(Prediction, found, where).model_dump(exclude_unset=True)


def read_predictions(path: pathlib.Path) -> list[dict]:
    """The predictions of a JSON-lines file.

    Raises:
        UserError: the file is missing or empty, a line is not a prediction, or two have one id.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions")
    predictions, first_use = [], {}
    for number, _, line in numbered_lines(path):
        prediction = _prediction(line, f"{path}:{number}")
        before = first_use.setdefault(prediction.get("id", (number,)), number)
        if before != number:
            raise UserError(
                f"{path}:{number}: the id {prediction['id']!r} is already used in line {before}; "
                "ids must differ"
            )
        predictions.append(prediction)
    if not predictions:
        raise UserError(f"{path}: contains no predictions")
    return predictions


def score_file(
    folder: pathlib.Path,
    file: pathlib.Path,
    judge: Judge | None = None,
    bertscore: BertScore | None = None,
) -> Rows:
    """Scores the predictions of one file, from any model, into FOLDER/NAME/TASK.

    Raises:
        UserError: the file cannot be used, or a set of its name was evaluated.
    """
    groups = predict.groups(read_predictions(file), lambda p: (p["task"], p["lang"]))
    parts = [(set_folder(folder, file.stem) / label, label, groups[label]) for label in groups]
    for out, _, _ in parts:
        if (out / PREDICTIONS).exists():
            raise UserError(
                f"{out}: has the predictions of an evaluated set; rename {file} to score it"
            )
        out.mkdir(parents=True, exist_ok=True)
    return [
        (file.stem, label, _score(out, found, {}, judge, bertscore)) for out, label, found in parts
    ]


def score_again(
    folder: pathlib.Path, judge: Judge | None = None, bertscore: BertScore | None = None
) -> Rows:
    """Scores all predictions below a folder again; measurements of their runs are kept."""
    rows = []
    for path in sorted(folder.glob(f"*/*/{PREDICTIONS}")):
        measured = read_measured(path.parent / METRICS)
        scores = _score(path.parent, read_predictions(path), measured, judge, bertscore)
        rows.append((path.parent.parent.name, path.parent.name, scores))
    if not rows:
        raise UserError(
            f"{folder}: contains no SET/TASK/{PREDICTIONS}; run eval.py without --score_only first"
        )
    return rows
