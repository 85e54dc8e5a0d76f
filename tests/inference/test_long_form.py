"""Long recordings: cuts at silence that cover everything, running prompts, and loops that are decoded again in pieces."""

import itertools
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from fastslm_jax.audio import WindowSpec
from fastslm_jax.errors import UserError
from fastslm_jax.inference import long_form
from fastslm_jax.inference.generator import Answer
from fastslm_jax.memory import CapacityError

SECOND = 16_000


def speech(seconds: float, pauses=(), length: float = 0.2) -> np.ndarray:
    """Noise with silences of that length around the given seconds."""
    samples = np.random.default_rng(0).normal(0, 3000, round(seconds * SECOND)).astype(np.int16)
    for pause in pauses:
        samples[round((pause - length / 2) * SECOND) : round((pause + length / 2) * SECOND)] = 0
    return samples


def test_cuts_lie_in_the_silence_before_a_border():
    found = long_form.cut(speech(70, pauses=(12, 27.3, 29, 52.2)), 30 * SECOND, 10 * SECOND)
    assert [start for start, _ in found] == [0, found[0][1], found[1][1]]
    assert found[-1][1] == 70 * SECOND
    assert found[0][1] / SECOND == pytest.approx(29, abs=0.1)
    assert 52.2 < found[1][1] / SECOND <= 29.1 + 30
    assert all(stop - start <= 30 * SECOND for start, stop in found)


def test_a_pause_between_sentences_is_silence_and_a_stop_within_a_word_is_not():
    samples = speech(40, pauses=(25.5,), length=0.3)
    samples[round(28.95 * SECOND) : 29 * SECOND] = 0
    assert long_form.cut(samples, 30 * SECOND, 10 * SECOND)[0][1] / SECOND == pytest.approx(
        25.5, abs=0.05
    )


@pytest.mark.parametrize("seconds", [0.1, 9.99, 10.0, 10.0 + 1 / SECOND, 10.4, 33.3])
@pytest.mark.parametrize("span", [1.5, 10.0, 25.0])
def test_spans_cover_everything_and_fit(seconds, span):
    found = long_form.cut(speech(seconds), round(span * SECOND), 10 * SECOND)
    assert found[0][0] == 0
    assert found[-1][1] == round(seconds * SECOND)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
    assert all(0 < stop - start <= span * SECOND for start, stop in found)


def test_halves_meet_in_the_silence_of_the_middle():
    (low, middle), (again, high) = long_form.halves(speech(9, pauses=(1, 4, 8)))
    assert (low, again, high) == (0, middle, 9 * SECOND)
    assert middle / SECOND == pytest.approx(4, abs=0.1)
    assert long_form.halves(speech(3.9)) == [(0, round(3.9 * SECOND))]


class Teller:
    """Stands in for a generator: says how many seconds it heard, and loops on recordings of `loops_from` seconds and more."""

    def __init__(self, loops_from=float("inf"), most_positions=10**9):
        self.model = types.SimpleNamespace(window=WindowSpec(frames=1000), tokens_per_window=5)
        self.encoder = types.SimpleNamespace(prompt_ids=lambda task, instruction: range(10))
        self.loops_from, self.most, self.heard = loops_from, most_positions, []

    def answer(self, requests, budgets, batch_size=None, slots=0, on_answer=None):
        for i, (request, budget) in enumerate(zip(requests, budgets, strict=True)):
            seconds = len(request.samples) / SECOND
            self.heard.append((round(seconds, 1), request.instruction, budget))
            reason = "loop" if seconds >= self.loops_from else "eos"
            windows = self.model.window.count(len(request.samples))
            on_answer(
                i, Answer(f"heard {seconds:.0f}", (1, 2, 3), windows, 5 * windows, reason, 0.5)
            )

    def check(self, positions, rows=1):
        if positions > self.most:
            raise CapacityError(f"{positions} positions are needed")


def test_a_recording_in_spans():
    job = long_form.LongFormRequest(speech(25, pauses=(9.5, 18.5)), span=10.0)
    (result,) = long_form.answer(Teller(), [job])
    ends = [segment.end for segment in result.segments]
    assert ends == pytest.approx([9.5, 18.5, 25], abs=0.1)
    assert [segment.start for segment in result.segments] == [0, *ends[:-1]]
    assert result.text == "heard 10 heard 9 heard 6" or result.text == "heard 9 heard 9 heard 6"
    assert (result.windows, result.speech_tokens, result.new_tokens, result.again) == (3, 15, 9, 0)
    assert (result.covered_seconds, result.stop_reason) == (25.0, "eos")


def test_summaries_are_not_cut():
    teller = Teller()
    long_form.answer(teller, [long_form.LongFormRequest(speech(25), task="ssum", span=10.0)])
    assert [seconds for seconds, *_ in teller.heard] == [25.0]


def test_spans_of_several_recordings_share_a_call():
    teller = Teller()
    results = long_form.answer(
        teller,
        [
            long_form.LongFormRequest(speech(25, pauses=(9, 18)), span=10.0),
            long_form.LongFormRequest(speech(4)),
        ],
    )
    assert len(teller.heard) == 4
    assert [len(result.segments) for result in results] == [3, 1]


def test_running_prompts_give_the_last_words_to_the_next_span():
    teller = Teller()
    long_form.answer(
        teller,
        [
            long_form.LongFormRequest(
                speech(25, pauses=(9, 18)), instruction="Write.", span=10.0, running_prompt=3
            )
        ],
    )
    instructions = [instruction for _, instruction, _ in teller.heard]
    first, second, _ = (f"heard {seconds:.0f}" for seconds, *_ in teller.heard)
    assert instructions[0] == "Write."
    assert instructions[1] == f"Write.\nIt goes on from: {first}"
    assert instructions[2] == f"Write.\nIt goes on from: {first.split()[1]} {second}"


def test_what_loops_is_decoded_again_in_smaller_pieces():
    done = []
    (result,) = long_form.answer(
        Teller(loops_from=6),
        [long_form.LongFormRequest(speech(16, pauses=(7.5, 11.5)))],
        progress=done.append,
    )
    assert (result.stop_reason, result.again) == ("eos", 3)
    assert len(result.segments) == 4
    assert [s.start for s in result.segments[1:]] == [s.end for s in result.segments[:-1]]
    assert sum(done) == pytest.approx(16)
    assert result.covered_seconds == 16.0


def test_pieces_that_cannot_be_smaller_stay_loops():
    (result,) = long_form.answer(Teller(loops_from=0), [long_form.LongFormRequest(speech(5))])
    assert (result.stop_reason, result.again, len(result.segments)) == ("loop", 1, 2)
    (summary,) = long_form.answer(
        Teller(loops_from=0), [long_form.LongFormRequest(speech(20), task="ssum")]
    )
    assert (summary.stop_reason, summary.again) == ("loop", 0)


def test_budgets_are_the_spans_or_the_users():
    teller = Teller()
    long_form.answer(
        teller,
        [
            long_form.LongFormRequest(speech(10)),
            long_form.LongFormRequest(speech(10), max_new_tokens=7),
        ],
    )
    assert [budget for *_, budget in teller.heard] == [124, 7]


@pytest.mark.parametrize(
    ("seconds", "task", "choice", "span"),
    [
        (90, "asr", "auto", None),
        (101, "asr", "auto", 50.0),
        (9000, "asr", "none", None),
        (9000, "ssum", "auto", None),
        (90, "ast", "25", 25.0),
    ],
)
def test_spans_by_choice(seconds, task, choice, span):
    assert long_form.span_for(Teller(), seconds, task, None, 100.0, choice) == span


def test_auto_takes_what_fits():
    assert long_form.span_for(Teller(most_positions=500), 90, "asr", None, 100.0) == 45.0


@pytest.mark.parametrize(
    ("task", "choice", "remedy"),
    [
        ("asr", "none", "take spans (--span=auto)"),
        ("asr", "90", "take spans shorter than 90 s (--span=SECONDS)"),
        ("ssum", "auto", "cut the recording, which ssum hears as a whole"),
    ],
)
def test_what_does_not_fit_says_what_would_help(task, choice, remedy):
    with pytest.raises(CapacityError) as raised:
        long_form.span_for(Teller(most_positions=100), 90, task, None, 100.0, choice)
    assert str(raised.value).startswith("a recording of 1.5 minutes: ")
    assert str(raised.value).endswith(f" positions are needed, or {remedy}")


@pytest.mark.parametrize("choice", ["some", "0.5", "nan", "inf"])
def test_spans_that_are_none(choice):
    with pytest.raises(UserError, match=f"--span={choice}: give auto, none, or seconds"):
        long_form.span_for(Teller(), 90, "asr", None, 100.0, choice)


def test_trained_seconds():
    sources = {"short": {"path": "a"}, "long": {"path": "a", "join": {"max_seconds": 900.0}}}
    assert long_form.trained_seconds(ConfigDict({"data": {"train": sources}}), 30.0) == 900.0
    assert (
        long_form.trained_seconds(ConfigDict({"data": {"train": {"short": {"path": "a"}}}}), 30.0)
        == 30.0
    )
    assert long_form.trained_seconds(ConfigDict({"data": {"train": {}}}), 30.0) == 900.0
