"""Evaluation of a manifest: every utterance answered once and in order, budgets that grow, and the wrong-audio control."""

import dataclasses

import pytest

from fastslm_jax.audio import WindowSpec
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict as evaluation
from fastslm_jax.inference.generator import Answer


class Echo:
    """Stands in for `decode.Generator`: its answer is the number of samples that it heard."""

    class model:  # noqa: N801
        window = WindowSpec(frames=100)
        tokens_per_window = 3

    class encoder:  # noqa: N801
        @staticmethod
        def prompt_ids(task, instruction):
            return range(20)

    def __init__(self):
        self.calls = []

    def answer(self, requests, max_new_tokens, batch_size=None, slots=0, on_answer=None):
        self.calls.append((len(requests), list(max_new_tokens), batch_size, slots))
        for i, request in enumerate(requests):
            windows = self.model.window.count(len(request.samples))
            on_answer(
                i,
                Answer(
                    f"{request.task} {len(request.samples)}",
                    (1, 2),
                    windows,
                    3 * windows,
                    "eos",
                    0.25,
                ),
            )


@pytest.fixture
def utterances(corpus):
    return read_manifest(corpus / "train.jsonl")


@pytest.mark.parametrize(("seconds", "tokens"), [(0.0, 64), (10.0, 124), (3600.0, 21_664)])
def test_budgets_grow_with_the_recording(seconds, tokens):
    assert evaluation.budget(seconds) == tokens


def test_predictions_are_in_the_order_of_the_manifest(utterances):
    echo, done = Echo(), []
    predictions = evaluation.predict(echo, utterances, batch_size=4, progress=done.append)
    assert [p["id"] for p in predictions] == [u.id for u in utterances]
    assert [p["hypothesis"] for p in predictions] == [
        f"{u.task} {u.num_samples}" for u in utterances
    ]
    assert [p["reference"] for p in predictions] == [u.answer for u in utterances]
    assert [p["seconds"] for p in predictions] == [u.seconds for u in utterances]
    assert [p["windows"] for p in predictions] == [
        -(-int(100 * u.seconds) // 100) for u in utterances
    ]
    assert all(p["speech_tokens"] == 3 * p["windows"] for p in predictions)
    assert {
        (p["new_tokens"], p["stop_reason"], p["again"], p["first_token_seconds"])
        for p in predictions
    } == {(2, "eos", 0, 0.25)}
    assert all(p["seconds"] - p["covered_seconds"] < 0.01 for p in predictions)
    assert [("hypothesis_normalized" in p) for p in predictions] == [
        u.task in ("asr", "sqqa") for u in utterances
    ]
    assert sum(done) == pytest.approx(sum(u.seconds for u in utterances))


def test_recordings_of_like_length_share_a_cache(utterances):
    echo = Echo()
    long = dataclasses.replace(utterances[0], seconds=200.0, id="long")
    evaluation.predict(
        echo, [*utterances, long], batch_size=4, clip_for=[*utterances, utterances[0]].__getitem__
    )
    evaluation.predict(echo, utterances, batch_size=4)
    assert [count for count, *_ in echo.calls] == [len(utterances) + 1, len(utterances)]
    (slots,) = {slots for *_, slots in echo.calls}
    assert slots >= 20 + max(max(budgets) for _, budgets, *_ in echo.calls)


def test_what_is_known_is_not_answered_again(utterances):
    whole = evaluation.predict(Echo(), utterances)
    echo, kept = Echo(), []
    known = {p["id"]: p for p in whole[:4]}
    assert [
        p["hypothesis"] for p in evaluation.predict(echo, utterances, known=known, keep=kept.extend)
    ] == [p["hypothesis"] for p in whole]
    assert sum(count for count, *_ in echo.calls) == len(utterances) - 4
    assert {p["id"] for p in kept} == {u.id for u in utterances[4:]}


@pytest.mark.parametrize("count", [2, 3, 11])
def test_swapped_audio_is_always_anothers(utterances, count):
    for seed in range(20):
        clip_for = evaluation.swapped(utterances[:count], seed)
        clips = [clip_for(i).id for i in range(count)]
        assert sorted(clips) == sorted(u.id for u in utterances[:count])
        assert all(clip != utterance.id for clip, utterance in zip(clips, utterances, strict=False))


def test_a_single_utterance_has_no_other_audio(utterances):
    with pytest.raises(UserError, match="needs two utterances of a task at least"):
        evaluation.swapped(utterances[:1])


def test_the_control_hears_the_other_audio_and_keeps_its_own_reference(utterances):
    clip_for = evaluation.swapped(utterances)
    predictions = evaluation.predict(Echo(), utterances, clip_for=clip_for)
    assert [p["hypothesis"] for p in predictions] == [
        f"{u.task} {clip_for(i).num_samples}" for i, u in enumerate(utterances)
    ]
    assert [p["reference"] for p in predictions] == [u.answer for u in utterances]


def test_groups_by_task_and_language(utterances):
    groups = evaluation.by_task(utterances)
    assert {key: len(group) for key, group in groups.items()} == {
        ("asr", "en"): 6, ("ast", "ko"): 2, ("ssum", "en"): 1, ("sqqa", "en"): 2,
    }  # fmt: skip


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
    assert evaluation.summarize([prediction(), cut]) == {
        "em": 50.0, "f1": 50.0, "utterances": 2, "audio_seconds": 2.5, "out_of_budget": 1, "loop_rate": 0.0,
    }  # fmt: skip


def test_summary_of_what_was_measured():
    measured = {"covered_seconds": 1.0, "batch_seconds": 0.5, "first_token_seconds": 0.1}
    looped = prediction(
        stop_reason="loop", **measured | {"covered_seconds": 1.25, "first_token_seconds": 0.4}
    )
    summary = evaluation.summarize([prediction(**measured), looped, prediction(**measured)])
    assert (summary["loop_rate"], summary["coverage"]) == (0.3333, round(3.25 / 3.75, 4))
    assert (summary["rtfx"], summary["first_token_seconds"]) == (2.5, 0.1)


def test_wer_by_duration():
    pairs = [(1.0, "a b"), (4.0, "a c"), (31.0, "b b"), (9000.0, "a b")]
    predictions = [
        prediction(task="asr", seconds=seconds, reference="a b", hypothesis=text)
        for seconds, text in pairs
    ]
    found = evaluation.wer_by_duration(predictions)
    assert [(b["from"], b["to"], b["utterances"], b["wer"]) for b in found] == [
        (0, 5, 2, 25.0), (30, 60, 1, 50.0), (7200, None, 1, 0.0),
    ]  # fmt: skip
    assert evaluation.summarize(predictions, intervals=True)["wer_by_duration"] == found


@pytest.mark.parametrize(("seconds", "tokens"), [(10.0, 124), (28_800.0, 64 + 448 + 2880)])
def test_budgets_of_summaries_grow_slowly(seconds, tokens):
    assert evaluation.budget(seconds, "ssum") == tokens
