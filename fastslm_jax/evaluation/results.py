"""Predictions on disk, their scores beside them, and how both are shown: a table and a picture."""

import json
import os
import pathlib
from collections.abc import Sequence

from fastslm_jax.data.manifest import Utterance
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics
from fastslm_jax.evaluation import predict as evaluation
from fastslm_jax.evaluation.judge import Judge
from fastslm_jax.inference.generator import Generator

SHOWN = ("wer", "cer", "bleu", "chrf_pp", "chrf", "rougeL", "em", "f1", "accuracy", "judge", "rtfx")
JUDGED = ("ssum", "sqqa")
REQUIRED = ("task", "lang", "seconds", "reference", "hypothesis", "stop_reason")
MEASURED = ("run_seconds", "device", "peak_memory_gib", "checkpoint", "run", "rtfx_by_batch")
RTFX_UTTERANCES = 32

Table = list[tuple[str, str, dict]]


class Kept:
    """Predictions of a set and task in a folder: added as they come, so that a run that was stopped goes on.

    folder/predictions.part.jsonl has the run's settings in its first line, and metrics.json those of a run that ended; other
    settings start anew.
    """

    def __init__(self, folder: pathlib.Path, run: dict):
        self.folder, self._part = folder, folder / "predictions.part.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict] = {}
        self._measured: dict = {}  # of the run that all predictions come from, if it ended
        lines = self._part.read_text().splitlines() if self._part.exists() else []
        if lines and _parsed(lines[0]) == {"run": run}:
            found = [_parsed(line) for line in lines[1:]]
            self.known = {
                prediction["id"]: prediction for prediction in found if prediction
            }  # the last line may be torn
        elif not lines and (ended := self._ended(run)):
            self.known = {
                prediction["id"]: prediction
                for prediction in read_predictions(folder / "predictions.jsonl")
            }
            self._measured = ended
        text = "".join(
            json.dumps(line, ensure_ascii=False) + "\n"
            for line in ({"run": run}, *self.known.values())
        )
        _write(self._part, text)

    def _ended(self, run: dict) -> dict:
        """What was measured by a run with the same settings that ended here."""
        file = self.folder / "metrics.json"
        scores = (
            _parsed(file.read_text())
            if file.exists() and (self.folder / "predictions.jsonl").exists()
            else None
        )
        return (
            {name: scores[name] for name in MEASURED if name in scores}
            if scores and scores.get("run") == run
            else {}
        )

    def add(self, predictions: Sequence[dict]) -> None:
        self._measured = {}
        with open(self._part, "a") as file:
            file.writelines(
                json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions
            )

    def finish(
        self, predictions: Sequence[dict], measured: dict, judge: Judge | None = None
    ) -> dict:
        """Writes predictions.jsonl and metrics.json; returns the scores."""
        _write(
            self.folder / "predictions.jsonl",
            "".join(
                json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions
            ),
        )
        scores = _scored(self.folder, predictions, measured | self._measured, judge)
        self._part.unlink()
        return scores


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _scored(
    folder: pathlib.Path, predictions: Sequence[dict], measured: dict, judge: Judge | None
) -> dict:
    scores = evaluation.summarize(predictions, intervals=True)
    if judge and predictions[0]["task"] in JUDGED:
        scores |= judge.score(predictions)
    scores |= measured
    _write(folder / "metrics.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return scores


# ---------------------------------------------------------------------------------------------------------------- offline


def read_predictions(path: pathlib.Path) -> list[dict]:
    """Raises UserError for a file that is missing or has a line that is no prediction."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions")
    predictions = []
    for number, line in enumerate(path.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        found = _parsed(line)
        missing = (
            [name for name in REQUIRED if name not in found]
            if isinstance(found, dict)
            else list(REQUIRED)
        )
        if missing:
            raise UserError(
                f"{path}:{number}: no prediction; a line is a JSON object with {', '.join(REQUIRED)}"
            )
        predictions.append(found)
    if not predictions:
        raise UserError(f"{path}: holds no predictions")
    return predictions


def score_again(folder: pathlib.Path, file: str | None, judge: Judge | None = None) -> Table:
    """Scores the predictions below a folder, or those of a file, and writes metrics.json anew; what was measured stays."""
    table = []
    if file:
        predictions = read_predictions(pathlib.Path(file))
        name = pathlib.Path(file).stem
        groups: dict[tuple[str, str], list[dict]] = {}
        for prediction in predictions:
            groups.setdefault((prediction["task"], prediction["lang"]), []).append(prediction)
        for (task, lang), members in sorted(groups.items()):
            label = task if sum(task == other for other, _ in groups) == 1 else f"{task}-{lang}"
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            table.append((name, label, _scored(folder / name / label, members, {}, judge)))
        return table
    for path in sorted(folder.glob("*/*/predictions.jsonl")):
        before = path.parent / "metrics.json"
        old = json.loads(before.read_text()) if before.exists() else {}
        measured = {key: old[key] for key in MEASURED if key in old}
        scores = _scored(path.parent, read_predictions(path), measured, judge)
        table.append((path.parent.parent.name, path.parent.name, scores))
    if not table:
        raise UserError(
            f"{folder}: holds no SET/TASK/predictions.jsonl; run eval.py without --score_only first"
        )
    return table


def rtfx_by_batch(
    generator: Generator, utterances: Sequence[Utterance], sizes: Sequence[str], span_of
) -> dict[str, float]:
    """Audio seconds per second of run time, by batch size, on the first utterances; each size runs twice, the second counts."""
    speeds = {}
    for size in sizes:
        if not size.isdigit() or not int(size):
            raise UserError(f"--rtfx_batches={size}: give whole numbers above 0")
        part = utterances[:RTFX_UTTERANCES]
        for _ in range(2):
            predictions = evaluation.predict(generator, part, batch_size=int(size), span_of=span_of)
        speeds[size] = round(
            sum(p["seconds"] for p in predictions) / sum(p["batch_seconds"] for p in predictions), 2
        )
    return speeds


# ------------------------------------------------------------------------------------------------------------------ shown


def table(rows: Table) -> str:
    """A line for each set and task: its scores, the first with its interval."""
    lines = []
    for name, label, scores in rows:
        task, _, lang = label.partition("-")
        first = metrics.main_metric(task, lang or scores.get("lang", "en"))
        order = [first, *(key for key in SHOWN if key != first)]
        cells = []
        for key in (key for key in order if key in scores):
            low, high = (
                (scores.get("intervals", {}).get(key) or (None, None))
                if key == first
                else (None, None)
            )
            cells.append(
                f"{key} {scores[key]:.3f}"
                + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
            )
        lines.append(
            f"{name:>20} {label:>7}  {scores['utterances']:>5} utterances  " + "  ".join(cells)
        )
    return "\n".join(lines)


def picture(folder: pathlib.Path, rows: Table) -> None:
    """folder/eval.png: WER by duration of every ASR set, and speed by batch size where it was measured."""
    by_duration = [
        (f"{name} {label}", scores["wer_by_duration"])
        for name, label, scores in rows
        if "wer_by_duration" in scores
    ]
    by_batch = [
        (f"{name} {label}", scores["rtfx_by_batch"])
        for name, label, scores in rows
        if "rtfx_by_batch" in scores
    ]
    if not by_duration and not by_batch:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, buckets in by_duration:
        names = [
            f"{b['from']:g}-{b['to']:g} s" if b["to"] else f"{b['from']:g} s or more"
            for b in buckets
        ]
        left.plot(names, [b["wer"] for b in buckets], marker="o", label=name)
    left.set(title="WER by duration", ylabel="%")
    left.tick_params(axis="x", rotation=30)
    for name, speeds in by_batch:
        right.plot([int(size) for size in speeds], list(speeds.values()), marker="o", label=name)
    right.set(title="RTFx by batch size", xlabel="batch size", ylabel="audio seconds per second")
    for axes, drawn in ((left, by_duration), (right, by_batch)):
        if drawn:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    figure.savefig(folder / "eval.png", dpi=110)
    plt.close(figure)
