"""Scores of each task by its usual conventions, with 95 % bootstrap intervals.

ASR   corpus-level WER and CER (jiwer) after Whisper's normalizer.
AST   sacrebleu's BLEU, chrF++ and chrF, with their signatures.
SSUM  ROUGE-1, ROUGE-2 and ROUGE-L.
SQQA  exact match and word F1; accuracy if all references are options A to D.
"""

import collections
import functools
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jiwer
import numpy as np
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from fastslm_jax.data import languages
from fastslm_jax.data.tasks import TASKS

RESAMPLES = 1000
_Result = TypeVar("_Result")
OPTION = re.compile(r"\(?\s*([A-D])\s*(?:[).:]|$)")
ARTICLES = ("a", "an", "the")


# The conventions of a language. Any form of its code is allowed: "zh-CN" and "cmn" are "zh".


def is_english(lang: str) -> bool:
    return languages.parse(lang) == "en"


def is_spaceless(lang: str) -> bool:
    return languages.is_spaceless(languages.parse(lang))


def is_scored_by_characters(lang: str) -> bool:
    """Whether a language has loose or no word boundaries, so that papers report CER."""
    return is_spaceless(lang) or languages.parse(lang) == "ko"


def bleu_tokenizer(lang: str) -> str:
    """Name of sacrebleu's tokenizer."""
    if languages.script(languages.parse(lang)) in ("Hans", "Hant"):
        return "zh"
    return "char" if is_scored_by_characters(lang) else "13a"


@functools.cache
def normalizer(lang: str) -> Callable[[str], str]:
    """Whisper's text normalizer: the English one, or the basic one that keeps diacritics.

    Languages without spaces are split into characters.
    """
    if is_english(lang):
        return EnglishTextNormalizer()
    return BasicTextNormalizer(remove_diacritics=False, split_letters=is_spaceless(lang))


def normalize(text: str, lang: str) -> str:
    return " ".join(normalizer(lang)(text).split())


def _normalized(texts: Sequence[str], lang: str) -> list[str]:
    return [normalize(text, lang) for text in texts]


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, seed: int = 0
) -> list[float] | None:
    """The 95 % interval of a score, by resampling the utterances.

    Args:
        statistic: sums of rows [..., columns] → scores [...].
        rows: the contribution of each utterance to the sums, [utterances, columns].

    Returns:
        [low, high]; None for fewer than two utterances.
    """
    if len(rows) < 2:
        return None
    rng, rows = np.random.default_rng(seed), np.asarray(rows, np.float64)
    weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    return [
        round(float(value), 4) for value in np.percentile(statistic(weights @ rows), [2.5, 97.5])
    ]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The score from sums of `contributions`: [..., 2] → [...]."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def contributions(
    task: str, references: Sequence[str], hypotheses: Sequence[str], lang: str
) -> dict[str, np.ndarray]:
    """{score: rows [utterances, 2]} of the scores that are ratios of sums over the utterances.

    BLEU and chrF are not.
    """
    if task == "asr":
        return _asr_contributions(*_asr_texts(references, hypotheses, lang))
    values = {"ssum": _ssum_values, "sqqa": _sqqa_values}[task](references, hypotheses, lang)
    return {name: np.stack([each, np.ones(len(each))], axis=1) for name, each in values.items()}


def _intervals(rows: Mapping[str, np.ndarray]) -> dict[str, list[float] | None]:
    return {name: bootstrap(ratio, pairs) for name, pairs in rows.items()}


def error_counts(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """(substitutions, insertions, deletions, words) of a normalized pair."""
    words = jiwer.process_words(reference, hypothesis)
    return (
        words.substitutions,
        words.insertions,
        words.deletions,
        words.hits + words.substitutions + words.deletions,
    )


def asr(
    references: Sequence[str], hypotheses: Sequence[str], lang: str = "en", intervals: bool = False
) -> dict:
    """Corpus-level WER and CER in percent, and the error counts.

    If some references have no words: the number of these clips, how many of them got an answer with
    words, and the number of these words, which are insertions. Without any words, WER is 100 times
    the insertions.
    """
    references, hypotheses, characters = _asr_texts(references, hypotheses, lang)
    words, letters = (
        jiwer.process_words(references, hypotheses),
        jiwer.process_characters(*characters),
    )
    scores = {
        "wer": 100 * words.wer,
        "cer": 100 * letters.cer,
        "substitutions": words.substitutions,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "words": words.hits + words.substitutions + words.deletions,
    }
    if without_words := [h for r, h in zip(references, hypotheses, strict=True) if not r]:
        scores |= {
            "no_speech_clips": len(without_words),
            "no_speech_answered": sum(map(bool, without_words)),
            "no_speech_words": sum(len(hypothesis.split()) for hypothesis in without_words),
        }
    if intervals:
        scores["intervals"] = _intervals(_asr_contributions(references, hypotheses, characters))
    return scores


def _asr_texts(
    references: Sequence[str], hypotheses: Sequence[str], lang: str
) -> tuple[list[str], list[str], tuple[list[str], list[str]]]:
    """Normalized references and hypotheses, and both as they are compared by characters."""
    pair = _normalized(references, lang), _normalized(hypotheses, lang)
    spaceless = is_spaceless(lang)
    characters = tuple(
        [text.replace(" ", "") if spaceless else text for text in texts] for texts in pair
    )
    return *pair, characters


def _asr_contributions(
    references: Sequence[str], hypotheses: Sequence[str], characters: tuple[list[str], list[str]]
) -> dict[str, np.ndarray]:
    words = [error_counts(*pair) for pair in zip(references, hypotheses, strict=True)]
    letters = [
        jiwer.process_characters(reference, hypothesis)
        for reference, hypothesis in zip(*characters, strict=True)
    ]
    return {
        "wer": np.array([(100 * (s + i + d), count) for s, i, d, count in words]),
        "cer": np.array(
            [
                (
                    100 * (each.substitutions + each.insertions + each.deletions),
                    each.hits + each.substitutions + each.deletions,
                )
                for each in letters
            ]
        ),
    }


def ast(
    references: Sequence[str], hypotheses: Sequence[str], lang: str = "ko", intervals: bool = False
) -> dict:
    """BLEU, chrF++ and chrF from 0 to 100, with their signatures; `failed` as in `score`.

    The target language determines the tokenizer of BLEU.
    """
    scores, found, failed = {}, {}, {}
    makers = {
        "chrf": lambda: CHRF(),
        "chrf_pp": lambda: CHRF(word_order=2),
        "bleu": lambda: BLEU(tokenize=bleu_tokenizer(lang)),
    }
    for name, make in makers.items():
        metric = make()
        score = attempt(failed, name, metric.corpus_score, hypotheses, [references])
        if score is None:
            continue
        scores[name], scores[f"{name}_signature"] = score.score, str(metric.get_signature())
        if intervals:
            key = f"{name} interval"
            found[name] = attempt(failed, key, _sacrebleu_interval, make(), references, hypotheses)
    return scores | ({"intervals": found} if intervals else {}) | {"failed": failed}


def _sacrebleu_interval(
    metric: BLEU | CHRF, references: Sequence[str], hypotheses: Sequence[str]
) -> list[float] | None:
    if len(references) < 2:
        return None
    # Not corpus_score(n_bootstrap=…): it cannot average scores of which some are zero.
    test = PairedTest([("", hypotheses)], {"": metric}, [references], "bs", RESAMPLES)
    _, scores = test()
    (found,) = [value[0] for name, value in scores.items() if name != "System"]
    return [round(float(found.mean + sign * found.ci), 4) for sign in (-1, 1)]


class _Whitespace:
    """Splits at spaces; the default tokenizer of ROUGE drops all characters but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return text.lower().split()


def ssum(
    references: Sequence[str], hypotheses: Sequence[str], lang: str = "en", intervals: bool = False
) -> dict:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measures from 0 to 1, without stemming."""
    return _means(_ssum_values(references, hypotheses, lang), intervals)


def _ssum_values(
    references: Sequence[str], hypotheses: Sequence[str], lang: str
) -> dict[str, list[float]]:
    names = ("rouge1", "rouge2", "rougeL")
    tokenizer = DefaultTokenizer(use_stemmer=False) if is_english(lang) else _Whitespace()
    scorer = rouge_scorer.RougeScorer(names, tokenizer=tokenizer)
    each = [
        scorer.score(reference, hypothesis)
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return {name: [score[name].fmeasure for score in each] for name in names}


def _means(values: Mapping[str, Sequence[float]], intervals: bool) -> dict:
    scores = {name: float(np.mean(each)) for name, each in values.items()}
    if intervals:
        rows = {name: np.stack([v, np.ones(len(v))], axis=1) for name, v in values.items()}
        scores["intervals"] = _intervals(rows)
    return scores


def word_f1(reference: str, hypothesis: str, lang: str = "en") -> float:
    """F1 of the words shared by two normalized answers (SQuAD, arXiv 1606.05250).

    English articles are ignored.
    """
    skip = ARTICLES if is_english(lang) else ()
    ours, theirs = (
        [word for word in text.split() if word not in skip] for text in (hypothesis, reference)
    )
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def option(text: str) -> str | None:
    """The option A to D that an answer starts with, or mentions last.

    Examples: "B" → "B", "(c) red" → None, "The answer is C." → "C".
    """
    found = OPTION.match(text.strip())
    named = re.findall(r"\b([A-D])\b", text)
    return found.group(1) if found else named[-1] if named else None


def sqqa(
    references: Sequence[str], hypotheses: Sequence[str], lang: str = "en", intervals: bool = False
) -> dict:
    """Exact match and word F1 after normalization, and accuracy of options, in percent."""
    return _means(_sqqa_values(references, hypotheses, lang), intervals)


def _sqqa_values(
    references: Sequence[str], hypotheses: Sequence[str], lang: str
) -> dict[str, list[float]]:
    pairs = list(zip(_normalized(references, lang), _normalized(hypotheses, lang), strict=True))
    values = {
        "em": [100.0 * (reference == hypothesis) for reference, hypothesis in pairs],
        "f1": [100.0 * word_f1(reference, hypothesis, lang) for reference, hypothesis in pairs],
    }
    if all(OPTION.match(reference.strip()) for reference in references):
        chosen = zip(references, hypotheses, strict=True)
        values["accuracy"] = [
            100.0 * (option(reference) == option(hypothesis)) for reference, hypothesis in chosen
        ]
    return values


SCORERS = {"asr": asr, "ast": ast, "ssum": ssum, "sqqa": sqqa}


def scorers(task: str, lang: str) -> dict[str, str]:
    """{score: the library and the normalizer that it is of}."""

    def of(package: str) -> str:
        return f"{package} {importlib.metadata.version(package)}"

    spaceless = ", split into characters" if is_spaceless(lang) else ""
    kind = "English" if is_english(lang) else f"basic, diacritics kept{spaceless}"
    whisper = f"Whisper's normalizer ({of('whisper-normalizer')}, {kind})"
    if task == "asr":
        return dict.fromkeys(("wer", "cer"), f"{of('jiwer')}; {whisper}")
    if task == "ast":
        return dict.fromkeys(("chrf", "chrf_pp", "bleu"), f"{of('sacrebleu')}; not normalized")
    if task == "ssum":
        tokens = "its own tokenizer, no stemming" if is_english(lang) else "lower case, white space"
        return dict.fromkeys(("rouge1", "rouge2", "rougeL"), f"{of('rouge-score')}; {tokens}")
    return dict.fromkeys(("em", "f1"), whisper) | {"accuracy": "option letters; not normalized"}


def main_metric(task: str, lang: str) -> str:
    """The main score of a task, which is shown first and tracked on dev sets."""
    return "cer" if task == "asr" and is_scored_by_characters(lang) else TASKS[task].metric


def score(predictions: Sequence[dict], intervals: bool = False) -> dict:
    """Scores of predictions (task, lang, reference, hypothesis) of one task and language.

    What cannot be computed is missing; `failed` then has {its name: the reason}.
    """
    task, lang = predictions[0]["task"], languages.parse(predictions[0]["lang"])
    texts = [[p[name] for p in predictions] for name in ("reference", "hypothesis")]
    failed: dict[str, str] = {}
    found = attempt(failed, "intervals", SCORERS[task], *texts, lang, True) if intervals else None
    if found is None:
        found = attempt(failed, "scores", SCORERS[task], *texts, lang) or {}
    scores = {}
    for name, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            failed[name] = f"is {value}"
        else:
            scores[name] = round(value, 4) if isinstance(value, float) else value
    failed |= scores.pop("failed", {})
    return scores | ({"failed": failed} if failed else {})


def attempt(
    failed: dict[str, str], name: str, compute: Callable[..., _Result], *arguments: object
) -> _Result | None:
    """What a function returns, or None if it raises: one score must not cost the others.

    The reason is added to `failed` under the given name.
    """
    try:
        return compute(*arguments)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
        return None
