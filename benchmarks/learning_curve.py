"""WER over the amount of training, and the amount at which it would reach a target.

    python benchmarks/learning_curve.py COUNT=FILE COUNT=FILE … [--references=TEXTFILE]
        [--target=20] [--unit="different sentences"] [--out=FILE.png]

Each FILE is a predictions.jsonl of eval.py, of one checkpoint on one test set; COUNT is what that
checkpoint was trained on: windows, hours, sentences. The first file is the baseline. --references
keeps the utterances whose text is a line of TEXTFILE, to score a part of a set.

The curve is WER = a · COUNT^-b, fitted by least squares to the logarithms; the interval of 95 % is
of 2,000 resamples of the utterances, the same for all checkpoints. An amount far outside of the
measured ones is a guess: the curve is only known to hold between them. Last line: one JSON object.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import matplotlib

matplotlib.use("Agg")
import asr_predictions
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from banner import print_banner

from fastslm_jax import cli
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics

FLAGS = flags.FLAGS
RESAMPLES = 2000


def define_flags() -> None:
    asr_predictions.define_flags()
    flags.DEFINE_float("target", 20.0, "WER in % to extrapolate to.", lower_bound=0.1)
    flags.DEFINE_string("unit", "windows", "What the counts are, for the picture and the text.")
    flags.DEFINE_string("out", None, "File of the picture; none without it.")


def parse(argument: str) -> tuple[float, str]:
    count, _, file = argument.partition("=")
    try:
        number = float(count)
    except ValueError:
        number = 0.0
    if number <= 0 or not file:
        raise UserError(f"{argument!r} is not COUNT=FILE with a positive number")
    return number, file


def errors_and_words(files: list[str]) -> np.ndarray:
    """[files, utterances, 2]: 100 times the errors, and the words, of each utterance."""
    pairs, ids = [], None
    for file in files:
        found = {p.get("id", number): p for number, p in enumerate(asr_predictions.read(file))}
        ids = ids or list(found)
        if set(ids) != set(found):
            raise UserError(f"{file}: does not have the utterances of {files[0]}")
        texts = [[found[key][name] for key in ids] for name in ("reference", "hypothesis")]
        pairs.append(metrics.contributions("asr", *texts, found[ids[0]]["lang"])["wer"])
    return np.stack(pairs)


def fit(counts: np.ndarray, wers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log a, b) of WER = a · count^-b, for each row of `wers` [..., files]."""
    x, y = np.log(counts), np.log(np.maximum(wers, 1e-3))
    b = -((x - x.mean()) * y).sum(axis=-1) / ((x - x.mean()) ** 2).sum()
    return y.mean(axis=-1) + b * x.mean(), b


def count_at(target: float, log_a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The count at which a curve reaches the target; infinite if it does not fall."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(b > 0, np.exp((log_a - np.log(target)) / b), np.inf)


def draw(path: str, counts: np.ndarray, wers: np.ndarray, resampled: np.ndarray) -> None:
    """The measured points and the fitted curve, with intervals of 95 %."""
    figure, axes = plt.subplots(figsize=(6.5, 4), constrained_layout=True)
    x = np.geomspace(counts.min(), 100 * counts.max(), 50)

    def fitted(wers: np.ndarray) -> np.ndarray:
        log_a, b = fit(counts, wers)
        return np.exp(log_a[..., None] - b[..., None] * np.log(x))

    axes.fill_between(x, *np.percentile(fitted(resampled), [2.5, 97.5], axis=0), alpha=0.2)
    axes.plot(x, fitted(wers), "--", label="fitted: a · count^-b")
    ranges = np.abs(np.percentile(resampled, [2.5, 97.5], axis=0) - wers)
    axes.errorbar(counts, wers, yerr=ranges, fmt="o", capsize=3, label="measured")
    axes.axhline(FLAGS.target, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel=FLAGS.unit, ylabel="WER in %", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    points = sorted(map(parse, argv[1:]))
    if len({count for count, _ in points}) < 2:
        raise UserError("name predictions of at least two counts: COUNT=FILE COUNT=FILE")
    print_banner("WER over the amount of training; the first file is the baseline.", "cpu")
    counts, files = np.array([count for count, _ in points]), [file for _, file in points]
    pairs = errors_and_words(files)
    utterances = pairs.shape[1]
    weights = np.random.default_rng(0).multinomial(
        utterances, np.full(utterances, 1 / utterances), size=RESAMPLES
    )
    wers, resampled = metrics.ratio(pairs.sum(axis=1)), metrics.ratio(weights @ pairs).T
    ranges = np.percentile(resampled, [2.5, 97.5], axis=0)
    for count, wer, (low, high) in zip(counts, wers, ranges.T, strict=True):
        ratio = wer / wers[0]
        print(f"{count:>12,.0f}: WER {wer:.2f} % ({low:.2f} to {high:.2f}), {ratio:.3f} times")
    (log_a, b), (all_log_a, all_b) = fit(counts, wers), fit(counts, resampled)
    reached = count_at(FLAGS.target, log_a, b)
    b_range, reached_range = (
        np.percentile(each, [2.5, 97.5], method="nearest")
        for each in (all_b, count_at(FLAGS.target, all_log_a, all_b))
    )
    print(f"WER ~ count^-{b:.3f} ({b_range[0]:.3f} to {b_range[1]:.3f})")
    print(
        f"{FLAGS.target:g} % at {reached:.2g} {FLAGS.unit} "
        f"({reached_range[0]:.2g} to {reached_range[1]:.2g}) if that goes on"
    )
    if FLAGS.out:
        draw(FLAGS.out, counts, wers, resampled)
    result = {"utterances": utterances, "counts": counts.tolist(), "wer": wers.tolist()}
    result |= {"exponent": [float(b), *b_range.tolist()], "target": FLAGS.target}
    result["reached"] = [str(x) if np.isinf(x) else float(x) for x in (reached, *reached_range)]
    print(json.dumps(result))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
