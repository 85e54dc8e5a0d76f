"""Answers a manifest's utterances and scores them; used by eval.py, and by train.py on dev sets."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fastslm_jax import metrics
from fastslm_jax.data.manifest import Utterance, read_clip
from fastslm_jax.decode import Generator, Request, window_bucket
from fastslm_jax.errors import UserError

TOKENS_PER_SECOND = 6.0  # speech has up to three words a second; an answer may take two tokens for each
MIN_NEW_TOKENS = 64


def budget(seconds: float) -> int:
    """The most new tokens of an answer: it grows with the recording, so that no transcript is cut."""
    return MIN_NEW_TOKENS + int(TOKENS_PER_SECOND * seconds)


def _batches(utterances: Sequence[Utterance], bucket_of: Callable[[Utterance], int], batch_size: int) -> Iterator[list[int]]:
    """Utterances of like length together; the longer they are, the fewer."""
    buckets: dict[int, list[int]] = {}
    for i, utterance in enumerate(utterances):
        buckets.setdefault(bucket_of(utterance), []).append(i)
    for bucket in sorted(buckets):
        size = max(1, min(batch_size, 4 * batch_size // bucket))
        members = buckets[bucket]
        yield from (members[start : start + size] for start in range(0, len(members), size))


def predict(
    generator: Generator,
    utterances: Sequence[Utterance],
    *,
    batch_size: int = 32,
    progress: Callable[[float], None] = lambda _: None,
    clip_for: Callable[[int], Utterance] | None = None,
) -> list[dict]:
    """Answers every utterance.

    Args:
        progress: called with the audio seconds done since the last call.
        clip_for: whose audio stands in for that of utterance i (a control: the model must then fail).

    Returns:
        per utterance, in order: id, task, lang, seconds, reference, hypothesis, windows, speech_tokens, new_tokens, stop_reason.
    """
    spec, clip_for = generator.model.window, clip_for or utterances.__getitem__
    predictions: list[dict | None] = [None] * len(utterances)

    def bucket_of(utterance):
        return window_bucket(spec.count(utterance.num_samples))

    for members in _batches(utterances, bucket_of, batch_size):
        started = time.time()
        requests, budgets = [], []
        for i in members:
            clip = clip_for(i)
            requests.append(Request(read_clip(clip), utterances[i].task, utterances[i].instruction))
            budgets.append(budget(clip.seconds))
        bucket = bucket_of(clip_for(members[0]))
        answers = generator.answer(requests, budgets, batch_size=max(1, min(batch_size, 4 * batch_size // bucket)))
        elapsed = time.time() - started
        for i, answer in zip(members, answers, strict=True):
            utterance = utterances[i]
            predictions[i] = {
                "id": utterance.id,
                "task": utterance.task,
                "lang": utterance.lang,
                "seconds": utterance.seconds,
                "reference": utterance.answer,
                "hypothesis": answer.text,
                "windows": answer.windows,
                "speech_tokens": answer.speech_tokens,
                "new_tokens": len(answer.token_ids),
                "stop_reason": answer.stop_reason,
                "batch_seconds": round(elapsed / len(members), 4),
            }
        progress(sum(utterances[i].seconds for i in members))
    return predictions


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
        raise UserError("the wrong-audio control needs two utterances of a task at least: each hears another's audio")
    order = np.random.default_rng(seed).permutation(len(utterances))
    other = {int(order[i]): int(order[(i + 1) % len(order)]) for i in range(len(order))}
    return lambda i: utterances[other[i]]


def summarize(predictions: Sequence[dict]) -> dict[str, float]:
    """Scores of the set, with its audio seconds, and how many answers ran out of their budget."""
    seconds = sum(p["seconds"] for p in predictions)
    return metrics.score(predictions) | {
        "utterances": len(predictions),
        "audio_seconds": round(seconds, 1),
        "out_of_budget": sum(p["stop_reason"] == "budget" for p in predictions),
    }
