"""The results of an experiment: JSON lines, a table and a picture."""

import collections
import json
import pathlib
from collections.abc import Iterable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fastslm_jax import outputs
from fastslm_jax.synthesis.manner import Manner

RESULTS, TABLE, PICTURE = "results.jsonl", "results.md", "results.png"
SCORES = ("WER, ", "accuracy, ")  # starts of the columns in %
Columns = dict[str, dict[str, list[float]]]  # {variant: {column: a value of each seed}}


def write(folder: pathlib.Path, question: str, records: Sequence[dict]) -> None:
    """Writes FOLDER/results.jsonl, results.md and results.png.

    Args:
        records: lines of results.jsonl.
    """
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    outputs.write_text(folder / RESULTS, lines)
    outputs.write_text(folder / TABLE, f"{question}\n\n{table(records)}")
    picture(folder / PICTURE, question, records)


def is_written(folder: pathlib.Path) -> bool:
    return all((folder / name).exists() for name in (RESULTS, TABLE, PICTURE))


def headline(record: dict) -> str:
    """The first score of a record: "WER, test 12.3 %"."""
    name, value = next(item for item in _columns(record).items() if item[0].startswith(SCORES))
    return f"{name} {value:.1f} %"


def _columns(record: dict) -> dict[str, float]:
    """The columns of the table that a record fills."""
    if "features" in record:
        return {f"accuracy, {record['features']}": 100 * record["scores"]["test"]["accuracy"]}
    if "model" in record:
        return {f"WER, {record['model']}": record["scores"]["test"]["wer"]}
    return {
        "adapter parameters": record["parameters"]["adapter"],
        "MFLOP/s of audio": round(record["flops_per_audio_second"] / 1e6),
        "steps": record["steps"],
        "minutes": record["seconds"] / 60,
        **{f"WER, {name}": scores["wer"] for name, scores in record["scores"].items()},
        **{f"WER, {m} min": wer for m, wer in record.get("wer_by_minutes", {}).items()},
    }


def collect(records: Iterable[dict]) -> Columns:
    """{variant: {column: values}}, in the order in which they appear."""
    found: Columns = {}
    for record in records:
        columns = found.setdefault(record["variant"], {})
        for name, value in _columns(record).items():
            columns.setdefault(name, []).append(value)
    return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:
        return f"{values[0]:,}"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(records: Sequence[dict]) -> str:
    """A Markdown table: mean ± standard deviation over the seeds, WER and accuracy in %."""
    found = collect(records)
    names = list(dict.fromkeys(name for columns in found.values() for name in columns))
    rows = [["", "seeds", *names], ["---"] * (2 + len(names))]
    for variant, columns in found.items():
        seeds = max(len(values) for values in columns.values())
        rows.append([variant, str(seeds), *(_cell(columns.get(name, ())) for name in names)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# ------------------------------------------------------------------------------------------ picture


def picture(path: pathlib.Path, question: str, records: Sequence[dict]) -> None:
    """WER with its standard deviation: by strength, by length, or by variant and set."""
    found = collect(records)
    if "model" in records[0]:
        figure = _by_strength(found)
    elif any("wer_by_minutes" in record for record in records):
        figure = _by_length(found)
    else:
        figure = _by_variant(found)
    figure.suptitle(question)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _points(
    axes: Axes, places: Sequence[str | float], values: Sequence[Sequence[float]], **style
) -> None:
    means, deviations = zip(*map(mean_and_deviation, values), strict=True)
    axes.errorbar(places, means, yerr=deviations, marker="o", capsize=3, **style)


def _by_variant(found: Columns) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    names = dict.fromkeys(name for columns in found.values() for name in columns)
    sets = [name for name in names if name.startswith(SCORES)]
    for number, name in enumerate(sets):
        shift = 0.12 * (number - (len(sets) - 1) / 2)  # side by side
        present = [(at + shift, c[name]) for at, c in enumerate(found.values()) if name in c]
        places, values = zip(*present, strict=True)
        _points(axes, places, values, label=name.partition(", ")[2], linestyle="none")
    axes.set_xticks(range(len(found)), found, rotation=20)
    axes.set(ylabel=f"{sets[0].partition(', ')[0]}, %")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _by_length(found: Columns) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for number, (variant, columns) in enumerate(found.items()):
        lengths = [name for name in columns if name.endswith(" min")]
        labels = [name.removeprefix("WER, ").removesuffix(" min") for name in lengths]
        shift = 0.04 * (number - (len(found) - 1) / 2)  # so that no bar hides another
        places = [at + shift for at in range(len(lengths))]
        style = {"linestyle": "--" if "," in variant else "-", "color": f"C{number % 10}"}
        _points(axes, places, [columns[name] for name in lengths], label=variant, **style)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="length of a recording, minutes", ylabel="WER, %")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _by_strength(found: Columns) -> plt.Figure:
    effects = collections.defaultdict(list)
    for variant in found:
        effect, _, strength = variant.rpartition(" ")
        if effect:
            effects[effect].append((strength, variant))
    clean = [variant for variant in found if " " not in variant]
    rows = -(-len(effects) // 4)
    figure, grid = plt.subplots(rows, 4, figsize=(13, 3.2 * rows), constrained_layout=True)
    panels = np.ravel(grid)
    for axes, (effect, strengths) in zip(panels, effects.items(), strict=False):
        neutral = getattr(Manner(), effect)
        points = [("none" if neutral is None else f"{neutral:g}", v) for v in clean] + strengths
        if neutral is not None:
            points.sort(key=lambda point: float(point[0]))
        for name in dict.fromkeys(name for columns in found.values() for name in columns):
            present = [(label, found[v][name]) for label, v in points if name in found[v]]
            labels, values = zip(*present, strict=True)
            _points(axes, labels, values, label=name.removeprefix("WER, "))
        axes.set(title=effect, ylabel="WER, %")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    for axes in panels[len(effects) :]:
        axes.axis("off")
    return figure
