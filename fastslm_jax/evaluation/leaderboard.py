"""WER by the convention of the Open ASR Leaderboard's English sets in August 2026.

Source: normalizer/{eval_utils,normalizer}.py of github.com/huggingface/open_asr_leaderboard. Texts
are stored raw and normalized at scoring; references without words are left out; chunks of a
recording are joined (`joined`); kaldialign counts the errors, and merges neighbouring words where
that gives a match: "ice cream" and "icecream" are equal.

The normalizer is Whisper's with the leaderboard's changes, except for its table of first names in
several spellings ("allan" is "allen"), which is not included. docs/eval.md lists the differences.
"""

import datetime
import functools
import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence

import huggingface_hub
import kaldialign
import numpy as np
import yaml
from whisper_normalizer.english import EnglishTextNormalizer

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics

DATASET = "hf-audio/open-asr-leaderboard"
_NOT_SCORED = ("", "ignore time segment in scoring")  # normalized references
SCORER = (
    f"kaldialign {importlib.metadata.version('kaldialign')}, merged compounds; English normalizer "
    "of the Open ASR Leaderboard of 2026-08, without its table of first names"
)

_FILLERS = "hmm|mm|mhm|mmm|uh|um|ah|aha|ahh|ahm|eh|ehehe|em|hm|huh|hum|mhum|uhm|umm|uhuh"
# Whisper's normalizer takes every 's for "is"; the leaderboard's only after these words. "The
# cat's" becomes "the cat s", which equals "the cats" by merging.
_BEFORE_IS = "it|he|she|what|that|who|here|there|how|when|where|why|this"
# Rewritten by the package whisper-normalizer, but not by the leaderboard.
_NOT_REWRITTEN = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")
_JOINED = (
    *("how ever", "wi fi", "hi fi", "lo fi", "sci fi", "e mail", "e book", "e commerce"),
    *("x ray", "t shirt", "a m", "p m"),
)
_WORDS = {"et cetera": "etc", "al right": "alright", "all right": "alright", "o k": "okay"}
_WORDS |= {words: words.replace(" ", "") for words in _JOINED}
_SPELLINGS = {"ok": "okay", "kay": "okay", "etcetera": "etc"}


@functools.cache
def normalizer() -> Callable[[str], str]:
    """The normalizer of the English sets: Whisper's, with the steps that the leaderboard adds."""
    whisper = EnglishTextNormalizer()
    whisper.ignore_patterns = rf"\b({_FILLERS})\b"
    changed = {r"'s\b": (rf"\b({_BEFORE_IS})'s\b", r"\1 is")}
    whisper.replacers = dict(
        changed.get(pattern, (pattern, text))
        for pattern, text in whisper.replacers.items()
        if pattern not in _NOT_REWRITTEN
    )
    numbers, spellings = whisper.standardize_numbers, whisper.standardize_spellings
    spellings.mapping = spellings.mapping | _SPELLINGS
    whisper.standardize_numbers = lambda text: numbers(_rewritten(text))
    whisper.standardize_spellings = lambda text: _with_acronyms(spellings(text))
    return whisper


def _rewritten(text: str) -> str:
    """Example: "all right e mail" → "alright email"."""
    text = " ".join(text.split())
    for words, replacement in _WORDS.items():
        text = re.sub(rf"\b{words}\b", replacement, text)
    return text


def _with_acronyms(text: str) -> str:
    """Joins runs of single letters and digits; a run with "a" or "i" must have three.

    Examples: "the b b c" → "the bbc", "i 5" → "i 5", "a 5 g" → "a5g".
    """

    def join(match: re.Match) -> str:
        run = match.group().split()
        least = 3 if {"a", "i"} & set(run) else 2
        return "".join(run) if len(run) >= least else match.group()

    return re.sub(r"(?<!\S)\w(?: \w)+(?!\S)", join, text)


def normalize(text: str) -> str:
    return " ".join(normalizer()(text).split())


def error_counts(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """(substitutions, insertions, deletions, words) of a normalized pair."""
    found = kaldialign.edit_distance(reference.split(), hypothesis.split(), merge_compounds=True)
    return found["sub"], found["ins"], found["del"], found["ref_len"]


def is_scored(reference: str) -> bool:
    """Whether the leaderboard scores a raw reference; one without words is left out."""
    return normalize(reference) not in _NOT_SCORED


def counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """`error_counts` of the raw pairs that are scored, [pairs, 4]."""
    pairs = [
        (normalize(reference), normalize(hypothesis))
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    found = [error_counts(*pair) for pair in pairs if pair[0] not in _NOT_SCORED]
    return np.array(found, np.int64).reshape(-1, 4)


def contributions(rows: np.ndarray) -> np.ndarray:
    """Counts [pairs, 4] → what each pair adds to the WER, as in `metrics.contributions`."""
    return np.stack([100 * rows[:, :3].sum(axis=1), rows[:, 3]], axis=1)


def score(references: Sequence[str], hypotheses: Sequence[str]) -> dict:
    """Corpus WER in percent, its 95 % interval, the error counts, and the pairs left out.

    Without any reference with words there is no WER. Keys begin with `leaderboard_`, to stand
    beside the scores of `metrics.score`.
    """
    rows = counts(references, hypotheses)
    names = ("substitutions", "insertions", "deletions", "words")
    found = dict(zip(names, rows.sum(axis=0).tolist(), strict=True))
    found |= {"scored": len(rows), "left_out": len(references) - len(rows)}
    named = {"scorers": {"leaderboard_wer": SCORER}}
    if not len(rows):
        return {"leaderboard_counts": found} | named
    pairs = contributions(rows)
    return {
        "leaderboard_wer": round(float(metrics.ratio(pairs.sum(axis=0))), 4),
        "intervals": {"leaderboard_wer": metrics.bootstrap(metrics.ratio, pairs)},
        "leaderboard_counts": found,
    } | named


# -------------------------------------------------------------------------------- chunks of a call


def joined(predictions: Sequence[dict]) -> list[dict]:
    """Chunks with one `parent_id` as one prediction of the recording, as the leaderboard does.

    Hypotheses are joined in the order of `chunk_index`, and lengths and times are added. Each
    chunk's reference is that of the whole recording. Other predictions are unchanged, and precede.

    Raises:
        UserError: a chunk is missing, or the references of a recording differ.
    """
    parents: dict[str, list[dict]] = {}
    for prediction in predictions:
        if prediction.get("parent_id") is not None:
            parents.setdefault(prediction["parent_id"], []).append(prediction)
    whole = [p for p in predictions if p.get("parent_id") is None]
    return whole + [_joined(parent, parents[parent]) for parent in sorted(parents)]


def _joined(parent: str, chunks: Sequence[dict]) -> dict:
    chunks = sorted(chunks, key=lambda chunk: chunk.get("chunk_index", -1))
    numbers = [chunk.get("chunk_index") for chunk in chunks]
    if numbers != list(range(len(chunks))):
        raise UserError(
            f"recording {parent!r}: its chunks have the chunk_index {numbers}, which should be 0 "
            f"to {len(chunks) - 1}; a missing chunk would count as deletions"
        )
    if len({chunk["reference"] for chunk in chunks}) > 1:
        raise UserError(
            f"recording {parent!r}: its chunks have different references; each needs that of the "
            "whole recording (score chunks with their own references without parent_id)"
        )
    added = ("seconds", "covered_seconds", "batch_seconds", "new_tokens", "again")
    sums = {
        name: sum(chunk[name] for chunk in chunks)
        for name in added
        if all(chunk.get(name) is not None for chunk in chunks)
    }
    reasons = [chunk["stop_reason"] for chunk in chunks]
    worst = next((reason for reason in ("loop", "budget") if reason in reasons), reasons[0])
    texts = [chunk["hypothesis"].strip() for chunk in chunks]
    first = {
        name: value
        for name, value in chunks[0].items()
        if name not in (*added, "chunk_index", "parent_id", "hypothesis_normalized")
    }
    text = " ".join(text for text in texts if text)
    return first | sums | {"id": parent, "hypothesis": text, "stop_reason": worst}


# -------------------------------------------------------------------------------- .eval_results


def parse_results(entries: Sequence[str]) -> dict[str, list[str]]:
    """{task id: sets} of the --eval_results flag.

    Example: ["mean_wer=ami+tedlium"] → {"mean_wer": ["ami", "tedlium"]}.
    """
    found = {}
    for entry in entries:
        task, _, sets = entry.partition("=")
        names = sets.split("+")
        if not task or not all(names) or task in found:
            raise UserError(
                f"--eval_results={entry}: use TASK_ID=SET or TASK_ID=SET+SET (their mean), each "
                "task id once, for example librispeech_clean_wer=librispeech_clean"
            )
        found[task] = names
    return found


def eval_results(tasks: Mapping[str, Sequence[str]], sets: Mapping[str, dict]) -> str:
    """The text of .eval_results/open_asr_leaderboard.yaml, which the Hugging Face hub reads.

    Args:
        tasks: {task id of the leaderboard's dataset: sets}. The value is the mean WER of the sets;
            of the task "rtfx", their audio seconds per second.
        sets: {set: scores of its English transcriptions}.

    Raises:
        UserError: a set has no such score.
    """
    entries = []
    for task, names in tasks.items():
        metric = "rtfx" if task == "rtfx" else "leaderboard_wer"
        for name in names:
            if metric not in sets.get(name, {}):
                raise UserError(
                    f"--eval_results={task}={'+'.join(names)}: the set {name!r} has no {metric} "
                    f"(sets with English transcriptions: {', '.join(sets) or 'none'})"
                )
        values = np.array([sets[name][metric] for name in names])
        if task == "rtfx":
            seconds = np.array([sets[name]["audio_seconds"] for name in names])
            value = seconds.sum() / (seconds / values).sum()
        else:
            value = values.mean()
        entries.append(
            huggingface_hub.EvalResultEntry(
                dataset_id=DATASET,
                task_id=task,
                value=round(float(value), 2),
                date=datetime.date.today().isoformat(),
                notes=None if task == "rtfx" else SCORER,
            )
        )
    return yaml.safe_dump(
        huggingface_hub.eval_result_entries_to_yaml(entries), sort_keys=False, width=1000
    )
