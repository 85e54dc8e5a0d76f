"""Evaluation of a manifest: one prediction per utterance, groups, and the wrong-audio control."""

import dataclasses

import jax.numpy as jnp
import pytest

from fastslm_jax.audio import WindowSpec
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict
from fastslm_jax.inference.capacity import Capacity
from fastslm_jax.inference.generator import Answer


class Echo:
    """A generator whose answer is the number of samples that it heard."""

    class model:  # noqa: N801
        window = WindowSpec(frames=100)
        tokens_per_window = 3

    class prompt_tokenizer:  # noqa: N801
        @staticmethod
        def prompt_ids(task, instruction):
            return range(20)

    def __init__(self):
        self.capacity = Capacity(self.model, self.prompt_tokenizer, jnp.float32)
        self.calls = []

    def stream(self, requests, *, batch_size=None, cache_length=0, partial=False):
        self.calls.append((len(requests), batch_size, cache_length))
        for i, request in enumerate(requests):
            windows = self.model.window.count(len(request.samples))
            text = f"{request.task} {len(request.samples)}"
            yield i, Answer(text, (1, 2), windows, 3 * windows, "eos", 0.25)


@pytest.fixture
def utterances(corpus):
    return read_manifest(corpus / "train.jsonl")


def test_predictions_are_in_the_order_of_the_manifest(utterances):
    found = predict.predictions(Echo(), utterances, batch_size=4)
    assert [p["id"] for p in found] == [u.id for u in utterances]
    assert [p["hypothesis"] for p in found] == [f"{u.task} {u.num_samples}" for u in utterances]
    assert [p["reference"] for p in found] == [u.answer for u in utterances]
    assert [p["seconds"] for p in found] == [u.seconds for u in utterances]
    assert [p["windows"] for p in found] == [-(-int(100 * u.seconds) // 100) for u in utterances]
    assert all(p["speech_tokens"] == 3 * p["windows"] for p in found)
    names = ("new_tokens", "stop_reason", "again", "first_token_seconds")
    assert {tuple(p[name] for name in names) for p in found} == {(2, "eos", 0, 0.25)}
    assert all(p["seconds"] - p["covered_seconds"] < 0.01 for p in found)
    is_normalized = [("hypothesis_normalized" in p) for p in found]
    assert is_normalized == [u.task in ("asr", "sqqa") for u in utterances]


def test_progress_is_the_audio_answered(utterances):
    steps = list(predict.predict(Echo(), utterances))
    assert sum(seconds for _, seconds, _ in steps) == pytest.approx(
        sum(u.seconds for u in utterances), abs=0.01 * len(utterances)
    )
    assert sum(prediction is not None for *_, prediction in steps) == len(utterances)
    # Progress comes as answers end, before the predictions of their group.
    assert [prediction is None for *_, prediction in steps[: len(utterances)]] == [True] * 11


def test_recordings_of_similar_length_share_a_cache(utterances):
    echo = Echo()
    long = dataclasses.replace(utterances[0], seconds=200.0, id="long")
    recordings = [predict.recording(u) for u in utterances]
    stretched = dataclasses.replace(recordings[0], seconds=200.0)
    predict.predictions(
        echo, [*utterances, long], batch_size=4, recordings=[*recordings, stretched]
    )
    assert [count for count, *_ in echo.calls] == [len(utterances), 1]
    assert echo.calls[0][2] < echo.calls[1][2]


def test_known_predictions_are_skipped(utterances):
    echo = Echo()
    found = [p for *_, p in predict.predict(echo, utterances, known=range(4)) if p]
    assert {p["id"] for p in found} == {u.id for u in utterances[4:]}
    assert sum(count for count, *_ in echo.calls) == len(utterances) - 4


@pytest.mark.parametrize("count", [2, 3, 11])
def test_swapped_audio_is_from_another_utterance(utterances, count):
    for seed in range(20):
        clips = [clip.id for clip in predict.swapped(utterances[:count], seed)]
        assert sorted(clips) == sorted(u.id for u in utterances[:count])
        assert all(clip != utterance.id for clip, utterance in zip(clips, utterances, strict=False))


def test_a_single_utterance_has_no_other_audio(utterances):
    with pytest.raises(UserError, match="needs at least two utterances of a task"):
        predict.swapped(utterances[:1])


def test_the_control_hears_the_other_audio_and_keeps_its_own_reference(utterances):
    clips = predict.swapped(utterances)
    recordings = [predict.recording(*pair) for pair in zip(utterances, clips, strict=True)]
    found = predict.predictions(Echo(), utterances, recordings=recordings)
    assert [p["hypothesis"] for p in found] == [
        f"{u.task} {clip.num_samples}" for u, clip in zip(utterances, clips, strict=True)
    ]
    assert [p["reference"] for p in found] == [u.answer for u in utterances]


def test_groups_by_task_and_language(utterances):
    korean = dataclasses.replace(utterances[0], lang="ko")
    sizes = {label: len(group) for label, group in predict.by_task(utterances).items()}
    assert sizes == {"asr": 6, "ast": 2, "ssum": 1, "sqqa": 2}
    labels = set(predict.by_task([*utterances, korean]))
    assert labels == {"asr-en", "asr-ko", "ast", "ssum", "sqqa"}


def prediction(**fields):
    base = {
        "task": "sqqa",
        "lang": "en",
        "reference": "nine",
        "hypothesis": "nine",
        "seconds": 1.25,
        "stop_reason": "eos",
    }
    return base | fields


def test_summary():
    cut = prediction(hypothesis="ten", stop_reason="budget")
    assert predict.summarize([prediction(), cut]) == {
        "em": 50.0,
        "f1": 50.0,
        "task": "sqqa",
        "lang": "en",
        "utterances": 2,
        "audio_seconds": 2.5,
        "out_of_budget": 1,
        "loop_rate": 0.0,
    }


def test_summary_of_what_was_measured():
    measured = {"covered_seconds": 1.0, "batch_seconds": 0.5, "first_token_seconds": 0.1}
    looped = prediction(
        stop_reason="loop", **measured | {"covered_seconds": 1.25, "first_token_seconds": 0.4}
    )
    summary = predict.summarize([prediction(**measured), looped, prediction(**measured)])
    assert (summary["loop_rate"], summary["coverage"]) == (0.3333, round(3.25 / 3.75, 4))
    assert (summary["rtfx"], summary["first_token_seconds"]) == (2.5, 0.1)


def test_wer_by_duration():
    pairs = [(1.0, "a b"), (4.0, "a c"), (31.0, "b b"), (9000.0, "a b")]
    predictions = [
        prediction(task="asr", seconds=seconds, reference="a b", hypothesis=text)
        for seconds, text in pairs
    ]
    found = predict.wer_by_duration(predictions)
    assert [(b["from"], b["to"], b["utterances"], b["wer"]) for b in found] == [
        (0, 5, 2, 25.0),
        (30, 60, 1, 50.0),
        (5400, None, 1, 0.0),
    ]
    assert predict.summarize(predictions, intervals=True)["wer_by_duration"] == found


def test_lost_and_invented_text_by_duration():
    """Recordings of 5 and 15 minutes have buckets of their own.

    One of two short recordings is half processed: 3/4 of the audio, 2 + 1 words of 2 + 2. The
    long one repeats "b" 30 times after the first: 32 words of 2.
    """
    short = prediction(task="asr", seconds=299.0, reference="a b", hypothesis="a b", again=1)
    half = short | {"hypothesis": "a", "covered_seconds": 149.5}
    long = short | {"seconds": 899.0, "hypothesis": "a" + 31 * " b", "stop_reason": "loop"}
    found = predict.wer_by_duration(
        [short | {"covered_seconds": 299.0}, half, long | {"covered_seconds": 899.0}]
    )
    names = ("from", "to", "coverage", "words_ratio", "loops", "again", "repeated_words")
    assert [[bucket[name] for name in names] for bucket in found] == [
        [180, 300, 0.75, 0.75, 0, 2, 0],
        [300, 900, 1.0, 16.0, 1, 1, 30],
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no no no no", 0),
        ("so " + 8 * "we go on " + "then", 0),  # 21 repeated words are no loop
        ("so " + 9 * "We go on " + "then", 24),
        (3 * "a b c d e f g h i j " + "and", 0),  # three times
        (25 * "a " + "then " + 25 * "b ", 48),
    ],
)
def test_repeated_words(text, count):
    assert predict.repeated_words(text) == count


def test_chunks_of_recordings_are_numbered(utterances):
    lines = [
        dataclasses.replace(utterances[0], recording=name, answer=name.upper()) for name in "abaab"
    ]
    found = predict.chunk_fields(lines)
    assert [(f["parent_id"], f["chunk_index"]) for f in found] == [
        *(("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1))
    ]
    other = dataclasses.replace(lines[0], answer="other")
    with pytest.raises(UserError, match="'a' have different transcripts"):
        predict.chunk_fields([*lines, other])
