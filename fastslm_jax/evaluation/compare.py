"""Whether one system is better than another: a paired bootstrap over two files of predictions.

Both systems are scored on the same 10,000 resamples of the recordings (or speakers, or utterances),
as in Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation"
(ICASSP 2004). BLEU and chrF use sacrebleu's paired bootstrap, 1,000 resamples of the utterances.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import leaderboard, metrics, predict, results

RESAMPLES = 10_000
BATCH = 100  # resamples at a time, to limit memory
UNITS = ("recording", "speaker", "utterance")
LOWER_IS_BETTER = ("wer", "cer", "leaderboard_wer")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A score of two systems on one set.

    Attributes:
        label: task, with the language if a file has several.
        difference: b - a.
        interval: 95 % of the differences; None: unknown (BLEU, chrF).
        improvement: share of the resamples in which b is better, ties counting half; None: unknown.
        p: two-sided: twice the share of the resamples on the less frequent side of no difference,
            which counts as both; one resample more, so that it is never 0.
        units: "87 recordings".
    """

    label: str
    score: str
    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None
    improvement: float | None
    p: float
    units: str

    def __str__(self) -> str:
        text = f"{self.label:>8} {self.score:<16} A {self.a:.3f}  B {self.b:.3f}  "
        text += f"B - A {self.difference:+.3f}"
        if self.interval is not None:
            text += f" [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"
            text += f"  P(B better) {self.improvement:.3f}"
        return f"{text}  p {self.p:.4f}  {self.units}"


def files(first: pathlib.Path, second: pathlib.Path, by: str | None = None) -> list[Comparison]:
    """Compares two files of predictions, for each task, language and score.

    Args:
        by: what is resampled, one of UNITS; default: recordings if both files name them, else
            utterances.

    Raises:
        UserError: a file cannot be used, or the files are not of the same utterances.
    """
    pair = [results.read_predictions(path) for path in (first, second)]
    a, b = _aligned(first, second, *map(leaderboard.joined, pair))
    if by is None:
        by = "recording" if all(p.get("recording") for p in [*a, *b]) else "utterance"
    groups = predict.groups(
        list(zip(a, b, strict=True)), lambda pair: (pair[0]["task"], pair[0]["lang"])
    )
    found = []
    for label, pairs in groups.items():
        found += _compare(label, *map(list, zip(*pairs, strict=True)), by)
    return found


def _aligned(
    first: pathlib.Path, second: pathlib.Path, a: list[dict], b: list[dict]
) -> tuple[list[dict], list[dict]]:
    """Both lists in the order of the first, matched by id; without ids, by position."""
    if any("id" not in p for p in [*a, *b]):
        a, b = ([{"id": i} | p for i, p in enumerate(each)] for each in (a, b))
    by_id = [{p["id"]: p for p in each} for each in (a, b)]
    problems = [
        f"{len(missing)} only in {path} (such as {min(missing, key=str)!r})"
        for path, one, other in ((first, *by_id), (second, *by_id[::-1]))
        if (missing := one.keys() - other.keys())
    ]
    for name in ("task", "lang", "reference"):
        other = [i for i, p in by_id[0].items() if i in by_id[1] and p[name] != by_id[1][i][name]]
        if other:
            problems.append(f"{len(other)} with another {name} (such as {other[0]!r})")
    if problems:
        raise UserError(
            f"--compare: {first} and {second} are not of the same set; of their utterances, "
            f"{', '.join(problems)}"
        )
    return a, [by_id[1][p["id"]] for p in a]


def _compare(label: str, a: list[dict], b: list[dict], by: str) -> list[Comparison]:
    task, lang = a[0]["task"], a[0]["lang"]
    references = [p["reference"] for p in a]
    systems = [[p["hypothesis"] for p in each] for each in (a, b)]
    if task == "ast":
        return _translations(label, references, systems, lang)
    units = _units(a, by)
    rows = [metrics.contributions(task, references, each, lang) for each in systems]
    scored = {name: np.ones(len(a), bool) for name in rows[0]}
    if task == "asr" and metrics.is_english(lang):
        name = "leaderboard_wer"
        scored[name] = np.array([leaderboard.is_scored(reference) for reference in references])
        for found, each in zip(rows, systems, strict=True):
            found[name] = leaderboard.contributions(leaderboard.counts(references, each))
    main = metrics.main_metric(task, lang)
    names = sorted(rows[0], key=lambda name: (name != main, name))
    return [
        _paired(label, name, rows[0][name], rows[1][name], units[scored[name]], by)
        for name in names
        if scored[name].any()
    ]


def _units(predictions: Sequence[dict], by: str) -> np.ndarray:
    """The number of each prediction's recording or speaker."""
    if by == "utterance":
        return np.arange(len(predictions))
    missing = [p.get("id") for p in predictions if not p.get(by)]
    if missing:
        raise UserError(
            f"--compare_by={by}: {len(missing)} predictions have no {by} (such as {missing[0]!r}); "
            "use --compare_by=utterance"
        )
    return np.unique([p[by] for p in predictions], return_inverse=True)[1]


def _paired(
    label: str, score: str, a: np.ndarray, b: np.ndarray, units: np.ndarray, by: str
) -> Comparison:
    """Bootstraps two systems' `metrics.contributions` [utterances, 2] with the same weights."""
    _, units = np.unique(units, return_inverse=True)
    count = int(units.max()) + 1
    if count < 2:
        raise UserError(
            f"--compare: {label} has only one {by} with a {score}, and a bootstrap needs two"
            + ("" if by == "utterance" else "; use --compare_by=utterance")
        )
    summed = np.zeros((count, 4))
    np.add.at(summed, units, np.concatenate([a, b], axis=1))
    rng, differences = np.random.default_rng(0), []
    for _ in range(RESAMPLES // BATCH):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=BATCH)
        sums = weights @ summed
        differences.append(metrics.ratio(sums[:, 2:]) - metrics.ratio(sums[:, :2]))
    differences = np.concatenate(differences)
    total = summed.sum(axis=0)
    values = float(metrics.ratio(total[:2])), float(metrics.ratio(total[2:]))
    below, above = float(np.mean(differences < 0)), float(np.mean(differences > 0))
    ties = 1 - below - above
    better = below if score in LOWER_IS_BETTER else above
    low, high = np.percentile(differences, [2.5, 97.5])
    return Comparison(
        label=label,
        score=score,
        a=values[0],
        b=values[1],
        difference=values[1] - values[0],
        interval=(float(low), float(high)),
        improvement=better + ties / 2,
        p=min(1.0, 2 * (RESAMPLES * (min(below, above) + ties) + 1) / (RESAMPLES + 1)),
        units=f"{count} {by}s",
    )


def _translations(
    label: str, references: list[str], systems: list[list[str]], lang: str
) -> list[Comparison]:
    scorers = {
        "chrf": CHRF(),
        "chrf_pp": CHRF(word_order=2),
        "bleu": BLEU(tokenize=metrics.bleu_tokenizer(lang)),
    }
    found = []
    for name, metric in scorers.items():
        named = [("A", systems[0]), ("B", systems[1])]
        test = PairedTest(named, {name: metric}, [references], "bs", metrics.RESAMPLES)
        _, scores = test()
        (a, b) = next(values for key, values in scores.items() if key != "System")
        difference = b.score - a.score
        units = f"{len(references)} utterances"
        found.append(
            Comparison(label, name, a.score, b.score, difference, None, None, b.p_value, units)
        )
    return found
