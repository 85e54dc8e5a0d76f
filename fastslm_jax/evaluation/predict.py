"""Answers the utterances of a manifest and scores them, for eval.py and train.py."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from fastslm_jax.data.manifest import Utterance, read_clip
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import leaderboard, metrics
from fastslm_jax.inference import long_form, repetition
from fastslm_jax.inference.generator import Generator
from fastslm_jax.inference.long_form import Recording, Result

# In seconds; the last bucket is open. Recordings of at most 5, 15, 30, 60 and 90 minutes have
# buckets of their own.
DURATION_EDGES = (0, 5, 10, 20, 30, 60, 180, 300, 900, 1800, 3600, 5400)


def groups(items: Sequence, key: Callable[[object], tuple[str, str]]) -> dict[str, list]:
    """{label: items} by (task, language): "asr", or "asr-ko" if a task has several languages."""
    found: dict[tuple[str, str], list] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    tasks = [task for task, _ in found]
    return {
        task if tasks.count(task) == 1 else f"{task}-{lang}": members
        for (task, lang), members in sorted(found.items())
    }


def by_task(utterances: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Utterances by label (see `groups`); each group is normalized and scored by its language."""
    return groups(utterances, lambda utterance: (utterance.task, utterance.lang))


def recording(utterance: Utterance, clip: Utterance | None = None) -> Recording:
    """An utterance as a recording, optionally with the audio of another one."""
    clip = clip or utterance
    read = functools.partial(read_clip, clip)
    return Recording(clip.seconds, read, utterance.task, utterance.prompt)


def predict(
    generator: Generator,
    utterances: Sequence[Utterance],
    *,
    batch_size: int = 32,
    recordings: Sequence[Recording] | None = None,
    known: Collection[int] = (),
) -> Iterator[tuple[int, float, dict | None]]:
    """Answers every utterance; yields progress as audio is processed.

    Args:
        recordings: what to answer for each utterance (default: `recording`); for the wrong-audio
            control, with the audio of other utterances.
        known: indices of utterances to skip, because their predictions are known.

    Yields:
        (index, seconds of its audio processed since its last item, its prediction or None if
        incomplete). A prediction has id, task, lang, seconds, recording, reference, hypothesis,
        windows, speech_tokens, new_tokens, stop_reason, covered_seconds, again,
        first_token_seconds, batch_seconds (its share of its group's run time, without compilation),
        rtfx (of its group), the speaker if known, for translations the transcript (source), and for
        tasks with normalized scores the normalized texts.
    """
    recordings = recordings or [recording(utterance) for utterance in utterances]
    open_ = sorted(set(range(len(utterances))) - set(known))
    covered = dict.fromkeys(open_, 0.0)
    for index, result in long_form.stream(
        generator, [recordings[i] for i in open_], batch_size=batch_size
    ):
        i = open_[index]
        progress = result.covered_seconds - covered[i]
        covered[i] = result.covered_seconds
        is_done = result.stop_reason is not None
        yield i, progress, _prediction(utterances[i], result) if is_done else None


def predictions(
    generator: Generator, utterances: Sequence[Utterance], **options: object
) -> list[dict]:
    """The predictions in the order of the utterances; see `predict` for the options."""
    found = {i: prediction for i, _, prediction in predict(generator, utterances, **options)}
    return [found[i] for i in range(len(utterances))]


def _prediction(utterance: Utterance, result: Result) -> dict:
    prediction = {
        "id": utterance.id,
        "task": utterance.task,
        "lang": utterance.lang,
        "seconds": utterance.seconds,
        "recording": utterance.recording,
        "reference": utterance.answer,
        "hypothesis": result.text,
        "windows": result.windows,
        "speech_tokens": result.speech_tokens,
        "new_tokens": result.new_tokens,
        "stop_reason": result.stop_reason,
        "covered_seconds": result.covered_seconds,
        "again": result.again,
        "first_token_seconds": result.first_token_seconds,
        "batch_seconds": round(result.run_seconds, 4),
        "rtfx": round(result.rtfx, 2),
    }
    if utterance.speaker:
        prediction["speaker"] = utterance.speaker
    if utterance.task == "ast" and utterance.text:
        prediction["source"] = utterance.text
    if TASKS[utterance.task].is_normalized:
        for name in ("reference", "hypothesis"):
            text = metrics.normalize(prediction[name], utterance.lang)
            prediction[f"{name}_normalized"] = text
    return prediction


def swapped(utterances: Sequence[Utterance], seed: int = 0) -> list[Utterance]:
    """The wrong-audio control: for each utterance, another one, whose audio it gets.

    Raises:
        UserError: there is no other utterance.
    """
    if len(utterances) < 2:
        raise UserError(
            "--swap_audio: the wrong-audio control needs at least two utterances of a task"
        )
    order = np.random.default_rng(seed).permutation(len(utterances))
    other = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
    return [utterances[other[i]] for i in range(len(utterances))]


def chunk_fields(utterances: Sequence[Utterance]) -> list[dict]:
    """{parent_id, chunk_index} of utterances that are the chunks of recordings, in order.

    Raises:
        UserError: the chunks of a recording have different transcripts; each needs the whole one.
    """
    found, counts, transcripts = [], {}, {}
    for utterance in utterances:
        name = utterance.recording
        counts[name] = counts.get(name, -1) + 1
        if transcripts.setdefault(name, utterance.answer) != utterance.answer:
            raise UserError(
                f"--chunks: the lines of the recording {name!r} have different transcripts; each "
                "needs that of the whole recording"
            )
        found.append({"parent_id": name, "chunk_index": counts[name]})
    return found


def repeated_words(text: str) -> int:
    """Words that only repeat the phrase before them, as in a repetition loop.

    A phrase of up to `repetition.PERIODS` words counts if it occurs at least four times in a row,
    with at least 24 repeated words; its first occurrence is not counted.
    """
    _, words = np.unique(np.array(text.lower().split(), str), return_inverse=True)
    is_repeated = np.zeros(len(words), bool)
    for period in range(1, min(repetition.PERIODS, len(words) - 1) + 1):
        equal = words[period:] == words[:-period]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]])))
        least = max(repetition.MIN_TOKENS, (repetition.REPEATS - 1) * period)
        for start, stop in edges.reshape(-1, 2):
            if stop - start >= least:
                is_repeated[start + period : stop + period] = True
    return int(is_repeated.sum())


def wer_by_duration(
    predictions: Sequence[dict], edges: Sequence[float] = DURATION_EDGES
) -> list[dict]:
    """Corpus WER and CER by duration, between consecutive edges in seconds; no empty buckets.

    Each bucket also has signs of lost and of invented text: the share of the audio that was
    processed (coverage, if known), words of the answers per word of the references (words_ratio),
    answers that end in a loop (loops), segments decoded again because of one (again), and
    `repeated_words`.
    """
    buckets = []
    for low, high in itertools.pairwise([*edges, float("inf")]):
        inside = [p for p in predictions if low <= p["seconds"] < high]
        scores = metrics.score(inside) if inside else {}
        if "wer" not in scores:
            continue
        answered = scores["words"] - scores["deletions"] + scores["insertions"]
        buckets.append(
            {
                "from": low,
                "to": high if high < float("inf") else None,
                "utterances": len(inside),
                "wer": scores["wer"],
                "cer": scores["cer"],
                **_coverage(inside),
                "words_ratio": round(answered / max(scores["words"], 1), 4),
                "loops": [p["stop_reason"] for p in inside].count("loop"),
                "again": sum(p.get("again") or 0 for p in inside),
                "repeated_words": sum(repeated_words(p["hypothesis"]) for p in inside),
            }
        )
    return buckets


def _coverage(predictions: Sequence[dict]) -> dict[str, float]:
    """{"coverage": processed share of the audio}, or {} if it is unknown."""
    if not all("covered_seconds" in p for p in predictions):
        return {}
    covered = sum(min(p["covered_seconds"], p["seconds"]) for p in predictions)
    return {"coverage": round(covered / sum(p["seconds"] for p in predictions), 4)}


def summarize(predictions: Sequence[dict], *, intervals: bool = False) -> dict:
    """Scores of predictions of one task and language (see `metrics.score`), coverage and speed.

    Chunks of a recording are joined first. With intervals, also what each score is of (scorers),
    and for transcriptions WER by duration and, in English, by the leaderboard's convention.

    rtfx is audio seconds per second of run time without compilation; first_token_seconds is the
    median. Both are omitted if they were not measured.
    """
    predictions = leaderboard.joined(predictions)
    seconds, count = sum(p["seconds"] for p in predictions), len(predictions)
    stopped = [p["stop_reason"] for p in predictions]
    summary = metrics.score(predictions, intervals) | {
        "task": predictions[0]["task"],
        "lang": predictions[0]["lang"],
        "utterances": count,
        "audio_seconds": round(seconds, 1),
        "out_of_budget": stopped.count("budget"),
        "loop_rate": round(stopped.count("loop") / count, 4),
    }
    summary |= _coverage(predictions)
    if intervals:
        _add_details(summary, predictions)
    spent = sum(p.get("batch_seconds", 0.0) for p in predictions)
    if spent:
        summary["rtfx"] = round(seconds / spent, 2)
    if all("first_token_seconds" in p for p in predictions):
        waits = [p["first_token_seconds"] for p in predictions]
        summary["first_token_seconds"] = float(np.median(waits))
    return summary


def _add_details(summary: dict, predictions: Sequence[dict]) -> None:
    task, lang = predictions[0]["task"], predictions[0]["lang"]
    summary["scorers"] = metrics.scorers(task, lang)
    if task == "asr":
        summary["wer_by_duration"] = wer_by_duration(predictions)
    if task == "asr" and metrics.is_english(lang):
        pairs = ([p[name] for p in predictions] for name in ("reference", "hypothesis"))
        failed: dict[str, str] = {}
        add(
            summary,
            metrics.attempt(failed, "leaderboard_wer", leaderboard.score, *pairs)
            or {"failed": failed},
        )


def add(summary: dict, scores: dict) -> None:
    """Adds scores to a summary, and what describes them (intervals, scorers, failed) to its own."""
    for name in ("intervals", "scorers", "failed"):
        if name in scores:
            summary[name] = summary.get(name, {}) | scores.pop(name)
    summary |= scores
