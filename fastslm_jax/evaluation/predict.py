"""Answers a manifest's utterances and scores them; used by eval.py, and by train.py on dev sets."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fastslm_jax import audio, devices
from fastslm_jax.data.manifest import Utterance, read_clip
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics
from fastslm_jax.inference import long_form
from fastslm_jax.inference.generator import Generator, bucketed_length
from fastslm_jax.inference.long_form import budget as budget

EDGES = (0, 5, 10, 20, 30, 60, 180, 600, 1800, 3600, 7200)  # seconds; the last bucket is open
GROUP_SECONDS = 3600.0  # audio that is read at a time


def _groups(
    generator: Generator, utterances: Sequence[Utterance], order: Sequence[int], span_of
) -> Iterator[tuple[int, list]]:
    """(slots, members): utterances whose contexts take caches of one size, and not too much audio at a time."""

    def slots_of(i):
        u = utterances[i]
        return bucketed_length(
            long_form.needed_positions(generator, u.seconds, u.task, u.instruction, span_of(u))
        )

    keyed = sorted((slots_of(i), utterances[i].num_samples, i) for i in order)
    for slots, same in itertools.groupby(keyed, key=lambda entry: entry[0]):
        members, seconds = [], 0.0
        for _, samples, i in same:
            if members and seconds + samples / audio.SAMPLE_RATE > GROUP_SECONDS:
                yield slots, members
                members, seconds = [], 0.0
            members.append(i)
            seconds += samples / audio.SAMPLE_RATE
        yield slots, members


def predict(
    generator: Generator,
    utterances: Sequence[Utterance],
    *,
    batch_size: int = 32,
    progress: Callable[[float], None] = lambda _: None,
    clip_for: Callable[[int], Utterance] | None = None,
    span_of: Callable[[Utterance], float | None] = lambda _: None,
    known: dict[str, dict] | None = None,
    keep: Callable[[list[dict]], None] = lambda _: None,
) -> list[dict]:
    """Answers every utterance.

    Args:
        progress: called with the audio seconds done since the last call.
        clip_for: whose audio stands in for that of utterance i (a control: the model must then fail).
        span_of: seconds of an utterance's spans (see `long_form.span_for`); None: one context.
        known: predictions of an earlier run by id, which are taken as they are.
        keep: called with predictions as they come.

    Returns:
        per utterance, in order: id, task, lang, seconds, reference, hypothesis, windows, speech_tokens, new_tokens,
        stop_reason, covered_seconds, again, first_token_seconds, batch_seconds (run time without compilation, its share of
        its group's), rtfx (audio seconds a second of its group), and for ASR and SQQA both texts as they are scored.
    """
    clip_for, known = clip_for or utterances.__getitem__, known or {}
    predictions: list[dict | None] = [known.get(utterance.id) for utterance in utterances]
    progress(sum(utterances[i].seconds for i, found in enumerate(predictions) if found))
    clips = [clip_for(i) for i in range(len(utterances))]
    for slots, members in _groups(
        generator, clips, [i for i, found in enumerate(predictions) if not found], span_of
    ):
        jobs = []
        for i in members:
            samples = read_clip(clips[i])
            jobs.append(
                long_form.LongFormRequest(
                    samples, utterances[i].task, utterances[i].instruction, span_of(clips[i])
                )
            )
        started, before = time.time(), devices.compiled_so_far()
        results = long_form.answer(generator, jobs, batch_size, slots=slots, progress=progress)
        compiling = (devices.compiled_so_far() - before).seconds
        per_second = max(0.0, time.time() - started - compiling) / sum(job.seconds for job in jobs)
        for i, job, result in zip(members, jobs, results, strict=True):
            predictions[i] = _prediction(utterances[i], job, result, per_second)
        keep([predictions[i] for i in members])
    return predictions


def _prediction(
    utterance: Utterance,
    job: long_form.LongFormRequest,
    result: long_form.Result,
    per_second: float,
) -> dict:
    prediction = {
        "id": utterance.id,
        "task": utterance.task,
        "lang": utterance.lang,
        "seconds": utterance.seconds,
        "reference": utterance.answer,
        "hypothesis": result.text,
        "windows": result.windows,
        "speech_tokens": result.speech_tokens,
        "new_tokens": result.new_tokens,
        "stop_reason": result.stop_reason,
        "covered_seconds": result.covered_seconds,
        "again": result.again,
        "first_token_seconds": result.first_token_seconds,
        "batch_seconds": round(per_second * job.seconds, 4),
        "rtfx": round(1 / max(per_second, 1e-9), 2),
    }
    if TASKS[utterance.task].is_normalized:
        for name in ("reference", "hypothesis"):
            prediction[f"{name}_normalized"] = metrics.normalize(prediction[name], utterance.lang)
    return prediction


def by_task(utterances: Sequence[Utterance]) -> dict[tuple[str, str], list[Utterance]]:
    """Utterances of a set by (task, language)."""
    groups: dict[tuple[str, str], list[Utterance]] = {}
    for utterance in utterances:
        groups.setdefault((utterance.task, utterance.lang), []).append(utterance)
    return groups


def swapped(utterances: Sequence[Utterance], seed: int = 0) -> Callable[[int], Utterance]:
    """For the wrong-audio control: utterance i hears another utterance of the set.

    Raises:
        UserError: there is no other utterance.
    """
    if len(utterances) < 2:
        raise UserError(
            "the wrong-audio control needs two utterances of a task at least: each hears another's audio"
        )
    order = np.random.default_rng(seed).permutation(len(utterances))
    other = {int(order[i]): int(order[(i + 1) % len(order)]) for i in range(len(order))}
    return lambda i: utterances[other[i]]


def wer_by_duration(predictions: Sequence[dict], edges: Sequence[float] = EDGES) -> list[dict]:
    """Corpus WER of the recordings that last between two edges, in seconds; buckets without recordings are left out."""
    buckets = []
    for low, high in itertools.pairwise([*edges, float("inf")]):
        inside = [p for p in predictions if low <= p["seconds"] < high]
        if inside:
            scores = metrics.score(inside)
            bucket = {
                "from": low,
                "to": high if high < float("inf") else None,
                "utterances": len(inside),
            }
            buckets.append(bucket | {name: scores[name] for name in ("wer", "cer")})
    return buckets


def summarize(predictions: Sequence[dict], *, intervals: bool = False) -> dict:
    """Scores of the set; how much audio it has and how much of it was heard; how answers ended; speed, where it was measured.

    rtfx: audio seconds per second of run time, compilation left out; first_token_seconds: the median.
    """
    seconds, count = sum(p["seconds"] for p in predictions), len(predictions)
    summary = metrics.score(predictions, intervals) | {
        "utterances": count,
        "audio_seconds": round(seconds, 1),
        "out_of_budget": sum(p["stop_reason"] == "budget" for p in predictions),
        "loop_rate": round(sum(p["stop_reason"] == "loop" for p in predictions) / count, 4),
    }
    if all("covered_seconds" in p for p in predictions):
        summary["coverage"] = round(
            sum(min(p["covered_seconds"], p["seconds"]) for p in predictions) / seconds, 4
        )
    if predictions[0]["task"] == "asr" and intervals:
        summary["wer_by_duration"] = wer_by_duration(predictions)
    spent = sum(p.get("batch_seconds", 0.0) for p in predictions)
    if spent:
        summary["rtfx"] = round(seconds / spent, 2)
    if all("first_token_seconds" in p for p in predictions):
        summary["first_token_seconds"] = float(
            np.median([p["first_token_seconds"] for p in predictions])
        )
    return summary
