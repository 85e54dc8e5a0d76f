"""The demo's report: report.json, a one-page figure, and a table."""

import json
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fastslm_jax.evaluation.predict import wer_by_duration

STAGE_NAMES = {
    "stage1": "1 short-form ASR",
    "stage2": "2 long-form ASR",
    "stage3": "3 instructions",
}
DURATION_EDGES = (0, 2.5, 3, 3.5, 4.5, 6, 60, 100, 140)  # seconds


def _read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _scores(out: pathlib.Path, name: str, task: str) -> dict:
    return json.loads(
        (out / "stage3" / "eval" / name / task / "metrics.json").read_text(encoding="utf-8")
    )


def _predictions(out: pathlib.Path, name: str, task: str) -> list[dict]:
    return _read_lines(out / "stage3" / "eval" / name / task / "predictions.jsonl")


def _losses(out: pathlib.Path, stage: str) -> tuple[list[int], list[float]]:
    lines = [line for line in _read_lines(out / stage / "metrics.jsonl") if "loss" in line]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def write(out: pathlib.Path, phases: dict) -> dict:
    """Writes report.json and report.png of a finished demo.

    Args:
        out: folder of the demo.
        phases: `Phases.state`.

    Returns:
        the content of report.json.
    """
    stages = []
    for stage in STAGE_NAMES:
        _, losses = _losses(out, stage)
        tenth = max(1, len(losses) // 10)  # the loss of one small batch is noisy
        first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
        minutes = round(phases[stage]["seconds"] / 60, 2)
        stages.append(
            {
                "name": stage,
                "first_loss": round(first, 4),
                "last_loss": round(last, 4),
                "minutes": minutes,
            }
        )
    summary = {
        "wer_short": _scores(out, "test", "asr")["wer"],
        "wer_unseen_voices": _scores(out, "test_unseen_voices", "asr")["wer"],
        "wer_long": _scores(out, "test_long", "asr")["wer"],
        "wer_wrong_audio": _scores(out, "test", "asr-swapped")["wer"],
        "chrf_ast": _scores(out, "test", "ast")["chrf"],
        "rougeL_ssum": _scores(out, "test", "ssum")["rougeL"],
        "em_sqqa": _scores(out, "test", "sqqa")["em"],
        "minutes": round(sum(phase["seconds"] for phase in phases.values()) / 60, 2),
        "peak_rss_gib": max(phase["peak_rss_gib"] for phase in phases.values()),
        "stages": stages,
    }
    _plot(out, summary)
    (out / "report.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def table(summary: dict) -> str:
    """The scores as text, one per line."""
    rows = [
        ("ASR, trained voices", f"WER {summary['wer_short']:.2f} %"),
        ("ASR, unseen voices", f"WER {summary['wer_unseen_voices']:.2f} %"),
        ("ASR, recordings of 1-3 minutes", f"WER {summary['wer_long']:.2f} %"),
        ("ASR, wrong audio (control)", f"WER {summary['wer_wrong_audio']:.1f} %"),
        ("speech translation en-ko", f"chrF {summary['chrf_ast']:.1f}"),
        ("speech summary", f"ROUGE-L {summary['rougeL_ssum']:.3f}"),
        ("spoken questions", f"exact match {summary['em_sqqa']:.1f} %"),
        ("time", f"{summary['minutes']:.1f} min, {summary['peak_rss_gib']:.1f} GiB"),
    ]
    return "\n".join(f"{name:<32} {value}" for name, value in rows)


def _plot_losses(axes: Axes, out: pathlib.Path) -> None:
    done = 0
    for stage, name in STAGE_NAMES.items():
        steps, losses = _losses(out, stage)
        places = [done + step for step in steps]
        (line,) = axes.plot(places, losses, linewidth=0.6, alpha=0.35)
        width = max(1, len(losses) // 10)  # moving average over a tenth of the stage
        means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        axes.plot(places[width - 1 :], means, label=name, linewidth=1.6, color=line.get_color())
        done += steps[-1]
    axes.set(title="training loss", xlabel="step", yscale="log")
    axes.legend(fontsize=8)


def _plot_dev_wer(axes: Axes, out: pathlib.Path, minutes: dict[str, float]) -> None:
    done = 0.0
    for stage, name in STAGE_NAMES.items():
        lines = _read_lines(out / stage / "metrics.jsonl")
        total = max(line["step"] for line in lines)
        points = [
            (done + minutes[stage] * line["step"] / total, line["dev/wer"])
            for line in lines
            if "dev/wer" in line
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        done += minutes[stage]
    axes.set(title="WER on dev during training", xlabel="minutes", ylabel="%")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _plot_wer_by_duration(axes: Axes, out: pathlib.Path) -> None:
    sets = ("test", "test_unseen_voices", "test_long")
    predictions = [p for name in sets for p in _predictions(out, name, "asr")]
    buckets = wer_by_duration(predictions, DURATION_EDGES)
    labels = [
        f"{bucket['from']:g}-{bucket['to']:g} s" if bucket["to"] else f"{bucket['from']:g}+ s"
        for bucket in buckets
    ]
    axes.barh(labels, [bucket["wer"] for bucket in buckets], color="tab:blue")
    axes.invert_yaxis()
    axes.set(title="WER by length of recording", xlabel="%")


def _plot(out: pathlib.Path, summary: dict) -> None:
    """Saves report.png: losses, WER over time, WER by duration, five examples and the scores."""
    figure = plt.figure(figsize=(13, 8))
    figure.suptitle("FastSLM demo: small model, synthetic speech, held-out sentences", fontsize=13)
    grid = figure.add_gridspec(
        2, 3, left=0.05, right=0.98, top=0.9, bottom=0.02, hspace=0.25, wspace=0.28
    )
    _plot_losses(figure.add_subplot(grid[0, 0]), out)
    _plot_dev_wer(
        figure.add_subplot(grid[0, 1]),
        out,
        {stage["name"]: stage["minutes"] for stage in summary["stages"]},
    )

    _plot_wer_by_duration(figure.add_subplot(grid[0, 2]), out)
    picks = [
        ("test", "asr"),
        ("test_unseen_voices", "asr"),
        ("test_long", "asr"),
        ("test", "ssum"),
        ("test", "sqqa"),
    ]
    blocks = []
    for name, task in picks:
        prediction = _predictions(out, name, task)[0]
        header = f"{name}, {task}, {prediction['seconds']:.1f} s"
        reference, hypothesis = (
            textwrap.shorten(prediction[key], 92) for key in ("reference", "hypothesis")
        )
        blocks.append(f"{header}\n   ref: {reference}\n   hyp: {hypothesis}")
    _write_text(figure.add_subplot(grid[1, :2]), "examples", "\n\n".join(blocks))
    _write_text(figure.add_subplot(grid[1, 2]), "scores", table(summary))
    figure.savefig(out / "report.png", dpi=110)
    plt.close(figure)


def _write_text(axes: Axes, title: str, text: str) -> None:
    axes.axis("off")
    axes.set_title(title, loc="left")
    axes.text(0, 0.97, text, va="top", family="monospace", fontsize=7.8)
