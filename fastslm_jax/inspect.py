"""Shows what is in an imported folder or a manifest, and what a config would make of it.

    python -m fastslm_jax.inspect DIR [--config=configs/stage2_longform.py] [--png=lengths.png] [--row=3 [--wav=row.wav]]

Without a config: hours, lengths, tasks, languages, speakers, rejections. With one, whose sources are then replaced by DIR: how
full its rows would be, and which row would suit; --row shows one row as a person reads it: segments, prompts, answers, slots.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import soundfile
from absl import flags
from ml_collections import config_flags

from fastslm_jax import cli
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import packing
from fastslm_jax.data import rows as pipeline
from fastslm_jax.data.ingest import store
from fastslm_jax.data.manifest import Utterance, read_manifest
from fastslm_jax.errors import UserError

FLAGS = flags.FLAGS
_BAR = "█"


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "An experiment, for what its rows would hold.")
    flags.DEFINE_string("png", None, "Draws lengths and packing there.")
    flags.DEFINE_integer("row", None, "Shows this row of the config's plan.", lower_bound=0)
    flags.DEFINE_string("wav", None, "Writes the row's audio there.")


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds / 60:.1f} min"


def _shares(pairs: Sequence[tuple[str, float]], shown: int = 6) -> str:
    """ "asr 12.00 h, ast 3.10 h, and 2 more" by seconds."""
    seconds: dict[str, float] = {}
    for name, value in pairs:
        seconds[name] = seconds.get(name, 0.0) + value
    ranked = sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{name or '(not named)'} {_hours(value)}" for name, value in ranked[:shown])
    return text + (f", and {len(ranked) - shown} more" if len(ranked) > shown else "")


def _histogram(seconds: np.ndarray, bins: int = 8, width: int = 40) -> list[str]:
    counts, edges = np.histogram(seconds, bins)
    most = counts.max()
    return [
        f"  {low:7.1f} … {high:7.1f} s {count:8d} {_BAR * round(width * count / most)}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def summary(path: pathlib.Path, utterances: Sequence[Utterance]) -> list[str]:
    """One screen about the clips."""
    seconds = np.array([utterance.seconds for utterance in utterances])
    lines = [
        f"{path}: {len(utterances)} clips, {_hours(seconds.sum())}",
        f"tasks       {_shares([(u.task, u.seconds) for u in utterances])}",
        f"languages   {_shares([(u.lang, u.seconds) for u in utterances])}",
        f"speakers    {len({u.speaker for u in utterances})}: {_shares([(u.speaker, u.seconds) for u in utterances], 3)}",
        f"recordings  {len({u.recording for u in utterances})}",
        "lengths     shortest {:.1f}, median {:.1f}, 95 % below {:.1f}, longest {:.1f} s".format(
            *np.percentile(seconds, [0, 50, 95, 100])
        ),
        *_histogram(seconds),
    ]
    if path.is_dir():
        rejected = store.description(path)["rejected"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in rejected.items())
        lines.append(
            f"rejected    {kinds or 'none'}"
            + (f" (see {path / store.REJECTED})" if rejected else "")
        )
    return lines


def fill(rows: pipeline.PackedRows) -> tuple[list[str], np.ndarray]:
    """What the rows of the first epoch hold, in words; and by row [rows, 3] the filled windows, tokens and labels."""
    examples, packed = rows.plan(0)
    sizes = rows.sizes(examples)
    filled = np.array([sizes[row].sum(axis=0) for row in packed])
    shape = rows.shape
    shares = filled.sum(axis=0) / (
        len(packed) * np.array([shape.windows, shape.tokens, shape.labels])
    )
    lines = [
        f"rows        {len(packed)} of {shape.windows} windows, {shape.tokens} tokens, {shape.labels} labels; "
        f"{len(examples)} examples, {len(examples) / len(packed):.1f} a row",
        "filled      windows {:.1%}, tokens {:.1%}, labels {:.1%}".format(*shares),
    ]
    better = packing.suggest(sizes, shape.windows)
    if better.tokens != shape.tokens:
        counts = [len(packing.pack(sizes, better)), better.windows, better.tokens]
        windows, tokens = (
            sizes[:, 0].sum() / (counts[0] * counts[1]),
            sizes[:, 1].sum() / (counts[0] * counts[2]),
        )
        flags_text = (
            f"--config.data.row.tokens={better.tokens} --config.data.row.labels={better.labels}"
        )
        lines.append(f"would suit  {flags_text}: windows {windows:.1%}, tokens {tokens:.1%}")
    return lines, filled


def show_row(rows: pipeline.PackedRows, number: int) -> list[str]:
    """A row as a person reads it."""
    examples = rows.examples(number)
    sizes = rows.sizes(examples)
    total, shape = sizes.sum(axis=0).tolist(), rows.shape
    lines = [
        f"row {number}: {len(examples)} examples; {total[0]} of {shape.windows} windows, {total[1]} of {shape.tokens} tokens, "
        f"{total[2]} of {shape.labels} labels"
    ]
    window, token = 0, 0
    for example, (windows, tokens, labels) in zip(examples, sizes.tolist(), strict=True):
        utterances, segments = rows.utterances(example), rows.segments(example)
        first, more = (
            utterances[0],
            f" and {len(utterances) - 1} more" if len(utterances) > 1 else "",
        )
        slots = f"windows {window} … {window + windows - 1}, tokens {token} … {token + tokens - 1}"
        lines += [
            f"  {first.id}{more} ({first.task}, {first.lang}): {segments[-1].end:.1f} s, {slots}, "
            f"{windows * rows.tokens_per_window} of speech, {labels} labels",
            f"    prompt  {rows.encoder.user_turn(first.task, first.instruction)!r}",
        ]
        for segment, said in zip(segments, _speakers(utterances), strict=True):
            lines.append(
                f"    {segment.start:7.2f} … {segment.end:7.2f} s  {said:12} {segment.text}"
            )
        lines.append(f"    answer  {rows.answer(example)}")
        window, token = window + windows, token + tokens
    return lines


def _speakers(utterances: Sequence[Utterance]) -> list[str]:
    """Of every segment, the speaker."""
    return [utterance.speaker for utterance in utterances for _ in utterance.segments or (None,)]


def row_audio(rows: pipeline.PackedRows, number: int) -> np.ndarray:
    """The row's recordings one after another, half a second apart: int16 at 16 kHz."""
    pause = np.zeros(SAMPLE_RATE // 2, np.int16)
    pieces = [
        piece for example in rows.examples(number) for piece in (rows.samples(example), pause)
    ]
    return np.concatenate(pieces[:-1])


def draw(
    path: str,
    utterances: Sequence[Utterance],
    rows: pipeline.PackedRows | None,
    filled: np.ndarray | None,
) -> None:
    """Lengths of the clips and of the examples, and how full every row is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 1 if filled is None else 3, figsize=(5 if filled is None else 14, 4), squeeze=False
    )
    axes[0, 0].hist([utterance.seconds for utterance in utterances], 50)
    axes[0, 0].set(title="clips", xlabel="seconds", ylabel="clips")
    if filled is not None:
        lengths = [rows.segments(example)[-1].end for example in rows.plan(0)[0]]
        axes[0, 1].hist(lengths, 50)
        axes[0, 1].set(title="examples", xlabel="seconds", ylabel="examples")
        slots = {
            "windows": rows.shape.windows,
            "tokens": rows.shape.tokens,
            "labels": rows.shape.labels,
        }
        for column, (name, count) in enumerate(slots.items()):
            axes[0, 2].hist(
                100 * filled[:, column] / count,
                np.linspace(0, 100, 51),
                histtype="step",
                label=name,
            )
        axes[0, 2].set(title="rows", xlabel="slots filled, %", ylabel="rows")
        axes[0, 2].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def make_rows(config, path: pathlib.Path) -> pipeline.PackedRows:
    """The rows of a config with its sources read from `path`; sources of tasks that it does not hold are left out."""
    from fastslm_jax.training import experiment

    held = {utterance.task for utterance in read_manifest(path)}
    with config.unlocked():
        for name in list(config.data.train):
            source = config.data.train[name]
            source.path = str(path)
            if source.tasks and not held & set(source.tasks):
                del config.data.train[name]
    if not config.data.train:
        raise UserError(
            f"{path}: holds none of the tasks of the config's sources, only {', '.join(sorted(held))}"
        )
    setup = experiment.build(config, weights=False)
    return experiment.make_rows(config.data.train, setup, setup.prompt_tokenizer())


def main(argv) -> None:
    if len(argv) != 2:
        raise UserError("one DIR is needed: an imported folder or a manifest")
    config = FLAGS.config
    if config is None and (FLAGS.row is not None or FLAGS.wav):
        raise UserError("--row and --wav need --config, which says what a row is")
    path = pathlib.Path(argv[1])
    utterances = read_manifest(path)
    rows = filled = None
    if FLAGS.row is None:  # said first: what does not fit the rows ends the command
        print("\n".join(summary(path, utterances)), flush=True)
    if config is not None:
        rows = make_rows(config, path)
        told, filled = fill(rows)
        print("\n".join(told if FLAGS.row is None else show_row(rows, FLAGS.row)))
    if FLAGS.png:
        draw(FLAGS.png, utterances, rows, filled)
        print(f"drawn: {FLAGS.png}")
    if FLAGS.wav:
        if FLAGS.row is None:
            raise UserError("--wav needs --row")
        samples = row_audio(rows, FLAGS.row)
        soundfile.write(FLAGS.wav, samples, SAMPLE_RATE)
        print(f"written: {FLAGS.wav}, {len(samples) / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
