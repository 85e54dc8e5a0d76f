"""Shows the contents of an imported folder or a manifest, and the rows a config makes from it.

    python -m fastslm_jax.inspect DIR [--config=configs/stage2_longform.py] [--png=lengths.png]
        [--row=3 [--wav=row.wav]]

Without a config: hours, lengths, tasks, languages, speakers and rejections. With a config, whose
sources are replaced by DIR: how full its rows are, and a row shape that suits the data. --row shows
the segments, prompts, answers and slots of one row.
"""

from absl import flags
from ml_collections import config_flags

from fastslm_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "The experiment whose rows to show.")
    flags.DEFINE_string("png", None, "Write a plot of clip lengths and row usage to this file.")
    flags.DEFINE_integer("row", None, "Show this row of the config's plan.", lower_bound=0)
    flags.DEFINE_string("wav", None, "Write the row's audio to this file.")


if __name__ == "__main__":
    define_flags()
    cli.parse_flags()  # before the imports below, which take seconds

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import soundfile
from ml_collections import ConfigDict

from fastslm_jax import outputs
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import packing
from fastslm_jax.data.ingest import store
from fastslm_jax.data.manifest import Utterance, read_manifest
from fastslm_jax.data.rows import PackedRows
from fastslm_jax.errors import UserError
from fastslm_jax.training import experiment

_BAR = "█"
_BAR_WIDTH = 40  # characters
_PAUSE_SECONDS = 0.5  # between the recordings of a row in --wav


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds / 60:.1f} min"


def _totals(named_seconds: Iterable[tuple[str, float]], shown: int = 6) -> str:
    """The largest totals by name: "asr 12.00 h, ast 3.10 h, and 2 more"."""
    totals: dict[str, float] = {}
    for name, seconds in named_seconds:
        totals[name] = totals.get(name, 0.0) + seconds
    ranked = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{name or '(unnamed)'} {_hours(total)}" for name, total in ranked[:shown])
    return text + (f", and {len(ranked) - shown} more" if len(ranked) > shown else "")


def _histogram(seconds: np.ndarray, buckets: int = 8) -> list[str]:
    """Text histogram of clip lengths in equally wide buckets, one line per bucket."""
    counts, edges = np.histogram(seconds, buckets)
    most = counts.max()
    return [
        f"  {low:7.1f} … {high:7.1f} s {count:8d} {_BAR * round(_BAR_WIDTH * count / most)}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def summary(path: pathlib.Path, utterances: Sequence[Utterance]) -> list[str]:
    """Describes clips in about one screen of text."""
    seconds = np.array([utterance.seconds for utterance in utterances])
    num_speakers = len({utterance.speaker for utterance in utterances})
    shortest, median, long, longest = np.percentile(seconds, [0, 50, 95, 100])
    lines = [
        f"{path}: {len(utterances)} clips, {_hours(seconds.sum())}",
        f"tasks       {_totals((u.task, u.seconds) for u in utterances)}",
        f"languages   {_totals((u.lang, u.seconds) for u in utterances)}",
        f"speakers    {num_speakers}: {_totals(((u.speaker, u.seconds) for u in utterances), 3)}",
        f"recordings  {len({u.recording for u in utterances})}",
        f"lengths     shortest {shortest:.1f}, median {median:.1f}, 95 % below {long:.1f}, "
        f"longest {longest:.1f} s",
        *_histogram(seconds),
    ]
    if path.is_dir():
        rejected = store.description(path)["rejected"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in rejected.items())
        where = f" (see {path / store.REJECTED})" if rejected else ""
        lines.append(f"rejected    {kinds or 'none'}{where}")
    return lines


def row_usage(rows: PackedRows) -> tuple[list[str], np.ndarray]:
    """How full the rows of the first epoch are.

    Returns:
        A description, and the filled windows, tokens and labels of every row: int64 [rows, 3].
    """
    examples, packed = rows.plan(0)
    sizes, shape = rows.sizes(examples), rows.shape
    filled = np.array([sizes[row].sum(axis=0) for row in packed])
    slots = len(packed) * np.array([shape.windows, shape.tokens, shape.labels])
    windows, tokens, labels = filled.sum(axis=0) / slots
    lines = [
        f"rows        {len(packed)} of {shape.windows} windows, {shape.tokens} tokens, "
        f"{shape.labels} labels; {len(examples)} examples, {len(examples) / len(packed):.1f} a row",
        f"filled      windows {windows:.1%}, tokens {tokens:.1%}, labels {labels:.1%}",
    ]
    better = packing.suggest(sizes, shape.windows)
    if better.tokens != shape.tokens:
        num_rows = len(packing.pack(sizes, better))
        windows = sizes[:, 0].sum() / (num_rows * better.windows)
        tokens = sizes[:, 1].sum() / (num_rows * better.tokens)
        lines.append(
            f"suggested   --config.data.row.tokens={better.tokens} "
            f"--config.data.row.labels={better.labels}: windows {windows:.1%}, tokens {tokens:.1%}"
        )
    return lines, filled


def describe_row(rows: PackedRows, number: int) -> list[str]:
    """Describes one row: slots, prompt, timed transcript and answer of every example."""
    examples = rows.examples(number)
    sizes = rows.sizes(examples)
    total, shape = sizes.sum(axis=0).tolist(), rows.shape
    lines = [
        f"row {number}: {len(examples)} examples; {total[0]} of {shape.windows} windows, "
        f"{total[1]} of {shape.tokens} tokens, {total[2]} of {shape.labels} labels"
    ]
    window, token = 0, 0
    for example, (windows, tokens, labels) in zip(examples, sizes.tolist(), strict=True):
        utterances, segments = rows.utterances(example), rows.segments(example)
        first = utterances[0]
        more = f" and {len(utterances) - 1} more" if len(utterances) > 1 else ""
        lines += [
            f"  {first.id}{more} ({first.task}, {first.lang}): {segments[-1].end:.1f} s, "
            f"windows {window} … {window + windows - 1}, tokens {token} … {token + tokens - 1}, "
            f"{windows * rows.tokens_per_window} of speech, {labels} labels",
            f"    prompt  {rows.prompt_tokenizer.user_turn(first.task, first.prompt)!r}",
        ]
        speakers = [u.speaker for u in utterances for _ in u.segments or (None,)]
        lines += [
            f"    {segment.start:7.2f} … {segment.end:7.2f} s  {speaker:12} {segment.text}"
            for segment, speaker in zip(segments, speakers, strict=True)
        ]
        lines.append(f"    answer  {rows.answer(example)}")
        window, token = window + windows, token + tokens
    return lines


def row_audio(rows: PackedRows, number: int) -> np.ndarray:
    """The recordings of a row, separated by pauses: int16 [n] at 16 kHz."""
    pause = np.zeros(round(_PAUSE_SECONDS * SAMPLE_RATE), np.int16)
    pieces = [
        piece for example in rows.examples(number) for piece in (rows.samples(example), pause)
    ]
    return np.concatenate(pieces[:-1])


def plot(
    path: str,
    utterances: Sequence[Utterance],
    rows: PackedRows | None,
    filled: np.ndarray | None,
) -> None:
    """Plots the lengths of clips and, with rows, the lengths of examples and how full rows are.

    Args:
        path: the image to write.
        utterances: the clips.
        rows: the config's rows, if there is a config.
        filled: the second result of `row_usage`, if there is a config.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns, width = (1, 5) if rows is None else (3, 14)
    figure, axes = pyplot.subplots(1, num_columns, figsize=(width, 4), squeeze=False)
    axes[0, 0].hist([utterance.seconds for utterance in utterances], 50)
    axes[0, 0].set(title="clips", xlabel="seconds", ylabel="clips")
    if rows is not None:
        lengths = [rows.segments(example)[-1].end for example in rows.plan(0)[0]]
        axes[0, 1].hist(lengths, 50)
        axes[0, 1].set(title="examples", xlabel="seconds", ylabel="examples")
        shape, edges = rows.shape, np.linspace(0, 100, 51)
        slots = {"windows": shape.windows, "tokens": shape.tokens, "labels": shape.labels}
        for column, (name, count) in enumerate(slots.items()):
            percent = 100 * filled[:, column] / count
            axes[0, 2].hist(percent, edges, histtype="step", label=name)
        axes[0, 2].set(title="rows", xlabel="slots filled, %", ylabel="rows")
        axes[0, 2].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def make_rows(config: ConfigDict, path: pathlib.Path) -> PackedRows:
    """The rows of a config whose sources are read from `path`.

    Sources whose tasks do not occur in `path` are dropped.
    """
    tasks = {utterance.task for utterance in read_manifest(path)}
    with config.unlocked():
        for name in list(config.data.train):
            source = config.data.train[name]
            source.path = str(path)
            if source.tasks and not tasks & set(source.tasks):
                del config.data.train[name]
    if not config.data.train:
        raise UserError(
            f"{path}: has clips of {', '.join(sorted(tasks))}, but no source of the config uses "
            "these tasks"
        )
    setup = experiment.build(config, weights=False)
    return experiment.make_rows(config.data.train, setup, setup.prompt_tokenizer())


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    if len(argv) != 2:
        raise UserError("exactly one DIR is required: an imported folder or a manifest")
    config = FLAGS.config
    if config is None and (FLAGS.row is not None or FLAGS.wav):
        raise UserError("--row and --wav require --config, which defines the rows")
    if FLAGS.wav and FLAGS.row is None:
        raise UserError("--wav requires --row")
    for flag in ("png", "wav"):
        if FLAGS[flag].value:
            outputs.check_file(FLAGS[flag].value, f"--{flag}")
    path = pathlib.Path(argv[1])
    utterances = read_manifest(path)
    rows = filled = None
    if FLAGS.row is None:  # printed first: the rows may raise
        print("\n".join(summary(path, utterances)), flush=True)
    if config is not None:
        rows = make_rows(config, path)
        lines, filled = row_usage(rows)
        print("\n".join(lines if FLAGS.row is None else describe_row(rows, FLAGS.row)))
    if FLAGS.png:
        plot(FLAGS.png, utterances, rows, filled)
        print(f"wrote {FLAGS.png}")
    if FLAGS.wav:
        samples = row_audio(rows, FLAGS.row)
        soundfile.write(FLAGS.wav, samples, SAMPLE_RATE)
        print(f"wrote {FLAGS.wav}, {len(samples) / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    cli.run(main)
