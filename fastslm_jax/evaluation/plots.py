"""Scores as a table and as a picture."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastslm_jax.evaluation import metrics

SHOWN = (
    *("wer", "leaderboard_wer", "cer", "bleu", "chrf_pp", "chrf", "rougeL", "em", "f1"),
    *("accuracy", "bertscore_f1", "judge", "rtfx"),
)

Rows = Sequence[tuple[str, str, dict]]  # (set, label, scores)


def table(rows: Rows) -> str:
    """A line per set and task: its scores, the main one first and with its interval."""
    lines = []
    for name, label, scores in rows:
        main = metrics.main_metric(scores["task"], scores["lang"])
        cells = []
        for key in [main, *(key for key in SHOWN if key != main)]:
            if key not in scores:
                continue
            interval = scores.get("intervals", {}).get(key) if key == main else None
            suffix = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            cells.append(f"{key} {scores[key]:.3f}{suffix}")
        cells += [f"{key} failed" for key in scores.get("failed", {})]
        count = scores["utterances"]
        lines.append(f"{name:>20} {label:>7}  {count:>5} utterances  " + "  ".join(cells))
    return "\n".join(lines)


def picture(path: pathlib.Path, rows: Rows) -> None:
    """WER by duration, and speed by batch size if measured; writes nothing without either."""
    durations = [
        (f"{name} {label}", scores["wer_by_duration"])
        for name, label, scores in rows
        if "wer_by_duration" in scores
    ]
    speeds = [
        (f"{name} {label}", scores["rtfx_by_batch"])
        for name, label, scores in rows
        if "rtfx_by_batch" in scores
    ]
    if not durations and not speeds:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, buckets in durations:
        names = [
            f"{b['from']:g}-{b['to']:g} s" if b["to"] else f"{b['from']:g} s or more"
            for b in buckets
        ]
        left.plot(names, [b["wer"] for b in buckets], marker="o", label=name)
    left.set(title="WER by duration", ylabel="%")
    left.tick_params(axis="x", rotation=30)
    for name, by_batch in speeds:
        sizes = [int(size) for size in by_batch]
        right.plot(sizes, list(by_batch.values()), marker="o", label=name)
    right.set(title="RTFx by batch size", xlabel="batch size", ylabel="audio seconds per second")
    for axes, drawn in ((left, durations), (right, speeds)):
        if drawn:
            axes.legend(fontsize=8)
        else:
            center = {"ha": "center", "va": "center", "transform": axes.transAxes}
            axes.text(0.5, 0.5, "not measured", **center)
    figure.savefig(path, dpi=110)
    plt.close(figure)
