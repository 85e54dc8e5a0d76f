"""Evaluation of a manifest: every utterance answered once and in order, budgets that grow, and the wrong-audio control."""

import pytest

from fastslm_jax import evaluation
from fastslm_jax.audio import WindowSpec
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.decode import Answer
from fastslm_jax.errors import UserError


class Echo:
    """Stands in for `decode.Generator`: its answer is the number of samples that it heard."""

    class model:  # noqa: N801
        window = WindowSpec(frames=100)

    def __init__(self):
        self.calls = []

    def answer(self, requests, max_new_tokens, batch_size=None):
        self.calls.append((len(requests), list(max_new_tokens), batch_size))
        return [Answer(f"{request.task} {len(request.samples)}", (1, 2), 1, 3, "eos") for request in requests]


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
    assert [p["hypothesis"] for p in predictions] == [f"{u.task} {u.num_samples}" for u in utterances]
    assert [p["reference"] for p in predictions] == [u.answer for u in utterances]
    assert [p["seconds"] for p in predictions] == [u.seconds for u in utterances]
    assert {(p["windows"], p["speech_tokens"], p["new_tokens"], p["stop_reason"]) for p in predictions} == {(1, 3, 2, "eos")}
    assert sum(done) == pytest.approx(sum(u.seconds for u in utterances))


def test_long_recordings_go_in_smaller_batches(utterances):
    echo = Echo()
    evaluation.predict(echo, utterances, batch_size=4)
    assert sum(count for count, _, _ in echo.calls) == len(utterances)
    for count, budgets, batch_size in echo.calls:
        seconds = (max(budgets) - 64) / 6
        assert count <= batch_size <= 4
        assert batch_size * seconds <= 16 or batch_size == 1  # at most 4 windows of 1 s for each row of the batch
    assert {batch_size for _, _, batch_size in echo.calls} != {4}


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
    assert [p["hypothesis"] for p in predictions] == [f"{u.task} {clip_for(i).num_samples}" for i, u in enumerate(utterances)]
    assert [p["reference"] for p in predictions] == [u.answer for u in utterances]


def test_groups_by_task_and_language(utterances):
    groups = evaluation.by_task(utterances)
    assert {key: len(group) for key, group in groups.items()} == {
        ("asr", "en"): 6, ("ast", "ko"): 2, ("ssum", "en"): 1, ("sqqa", "en"): 2,
    }  # fmt: skip


def test_summary():
    prediction = {"task": "sqqa", "lang": "en", "reference": "nine", "hypothesis": "nine", "seconds": 1.25, "stop_reason": "eos"}
    cut = prediction | {"hypothesis": "ten", "stop_reason": "budget"}
    assert evaluation.summarize([prediction, cut]) == {"em": 50.0, "utterances": 2, "audio_seconds": 2.5, "out_of_budget": 1}
