"""Long recordings: segments, context of earlier segments, and loops that are decoded again."""

import dataclasses
import itertools
import types

import numpy as np
import pytest
from signals import SECOND, noise_with_pauses

from fastslm_jax.audio import WindowSpec
from fastslm_jax.errors import UserError
from fastslm_jax.inference import long_form
from fastslm_jax.inference.generator import Answer
from fastslm_jax.inference.long_form import Recording
from fastslm_jax.memory import CapacityError


class FakeCapacity:
    """Counts one position per second, and knows a limit."""

    model = types.SimpleNamespace(window=WindowSpec(frames=1000), tokens_per_window=5)

    def __init__(self, limit: float):
        self.limit = limit

    def positions(self, num_samples, task, instruction, max_new_tokens):
        return 10 + 5 * self.model.window.count(num_samples) + max_new_tokens

    def check(self, positions, rows=1):
        if positions > self.limit:
            raise CapacityError(f"{positions} positions are needed")


class FakeGenerator:
    """Answers with the seconds that it heard, and loops from `loops_from` seconds on."""

    def __init__(self, loops_from: float = float("inf"), limit: float = float("inf")):
        self.capacity = FakeCapacity(limit)
        self.model = self.capacity.model
        self.loops_from = loops_from
        self.heard, self.calls = [], []

    def stream(self, requests, *, batch_size=None, cache_length=0, partial=False):
        self.calls.append(len(requests))
        for i, request in enumerate(requests):
            seconds = len(request.samples) / SECOND
            self.heard.append((round(seconds, 1), request.instruction, request.max_new_tokens))
            windows = self.model.window.count(len(request.samples))
            reason = "loop" if seconds >= self.loops_from else "eos"
            answer = Answer(f"heard {seconds:.0f}", (1, 2, 3), windows, 5 * windows, reason, 0.5)
            if partial:
                yield i, dataclasses.replace(answer, text="heard", stop_reason=None)
            yield i, answer


def recording(samples: np.ndarray, **fields) -> Recording:
    return Recording(len(samples) / SECOND, lambda: samples, **fields)


def results(generator, *recordings, **options) -> list[long_form.Result]:
    found = dict(long_form.stream(generator, recordings, **options))
    return [found[i] for i in range(len(recordings))]


def test_a_recording_in_segments():
    samples = noise_with_pauses(25, pauses=(9.5, 18.5))
    (result,) = results(FakeGenerator(), recording(samples, segment_seconds=10.0))
    ends = [segment.end for segment in result.segments]
    assert ends == pytest.approx([9.5, 18.5, 25], abs=0.1)
    assert [segment.start for segment in result.segments] == [0, *ends[:-1]]
    assert result.text in ("heard 10 heard 9 heard 6", "heard 9 heard 9 heard 6")
    assert (result.windows, result.speech_tokens, result.new_tokens, result.again) == (3, 15, 9, 0)
    assert (result.covered_seconds, result.stop_reason) == (25.0, "eos")
    assert result.rtfx > 0


def test_summaries_are_not_cut():
    generator = FakeGenerator()
    results(generator, recording(noise_with_pauses(25), task="ssum", segment_seconds=10.0))
    assert [seconds for seconds, *_ in generator.heard] == [25.0]


def test_segments_of_several_recordings_share_a_call():
    generator = FakeGenerator()
    found = results(
        generator,
        recording(noise_with_pauses(25, pauses=(9, 18)), segment_seconds=10.0),
        recording(noise_with_pauses(4)),
    )
    assert generator.calls == [4]
    assert [len(result.segments) for result in found] == [3, 1]


def test_recordings_are_grouped_by_cache_length_and_by_hour():
    generator = FakeGenerator()
    short, long = noise_with_pauses(2), noise_with_pauses(200)
    results(generator, recording(long), recording(short), recording(long))
    assert generator.calls == [1, 2]
    hours = [dataclasses.replace(recording(short), seconds=s) for s in (1800, 1800, 1, 9000, 1)]
    generator = FakeGenerator()
    results(generator, *hours, in_order=True)
    assert generator.calls == [2, 1, 1, 1]


def test_the_next_segment_gets_the_last_words_as_context():
    generator = FakeGenerator()
    samples = noise_with_pauses(25, pauses=(9, 18))
    results(
        generator,
        recording(samples, instruction="Write.", segment_seconds=10.0, context_words=3),
    )
    instructions = [instruction for _, instruction, _ in generator.heard]
    first, second, _ = (f"heard {seconds:.0f}" for seconds, *_ in generator.heard)
    assert instructions[0] == "Write."
    context = "The transcript so far ends with:"
    assert instructions[1] == f"Write.\n{context} {first}"
    assert instructions[2] == f"Write.\n{context} {first.split()[1]} {second}"


def test_partial_results_grow():
    samples = noise_with_pauses(25, pauses=(9.5, 18.5))
    found = [
        result
        for _, result in long_form.stream(
            FakeGenerator(), [recording(samples, segment_seconds=10.0)], partial=True
        )
    ]
    texts = [result.text for result in found]
    assert texts[0] == "heard"
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(texts))
    assert [result.stop_reason for result in found] == [None] * (len(found) - 1) + ["eos"]
    assert found[0].covered_seconds == 0.0
    assert found[-1].covered_seconds == 25.0


def test_a_loop_is_decoded_again_in_halves():
    samples = noise_with_pauses(16, pauses=(7.5, 11.5))
    covered = [
        result.covered_seconds
        for _, result in long_form.stream(FakeGenerator(loops_from=6), [recording(samples)])
    ]
    (result,) = results(FakeGenerator(loops_from=6), recording(samples))
    assert (result.stop_reason, result.again) == ("eos", 3)
    assert len(result.segments) == 4
    assert [s.start for s in result.segments[1:]] == [s.end for s in result.segments[:-1]]
    assert covered == sorted(covered)
    assert result.covered_seconds == 16.0


def test_loops_stay_if_asked_for():
    clip = dataclasses.replace(recording(noise_with_pauses(20)), redo_loops=False)
    (result,) = results(FakeGenerator(loops_from=6), clip)
    assert (result.stop_reason, result.again, len(result.segments)) == ("loop", 0, 1)


def test_loops_that_cannot_be_split_stay():
    (result,) = results(FakeGenerator(loops_from=0), recording(noise_with_pauses(5)))
    assert (result.stop_reason, result.again, len(result.segments)) == ("loop", 1, 2)
    (summary,) = results(FakeGenerator(loops_from=0), recording(noise_with_pauses(20), task="ssum"))
    assert (summary.stop_reason, summary.again) == ("loop", 0)


def test_token_budgets_grow_with_the_segment_or_are_given():
    generator = FakeGenerator()
    samples = noise_with_pauses(10)
    results(generator, recording(samples), recording(samples, max_new_tokens=7), in_order=True)
    assert [budget for *_, budget in generator.heard] == [124, 7]


@pytest.mark.parametrize(
    ("seconds", "task", "tokens"),
    [
        (0.0, "asr", 64),
        (10.0, "asr", 124),
        (3600.0, "asr", 21_664),
        (10.0, "ssum", 124),
        (28_800.0, "ssum", 64 + 448 + 2880),
    ],
)
def test_default_token_budgets(seconds, task, tokens):
    assert long_form.default_new_tokens(seconds, task) == tokens


# ---------------------------------------------------------------------------------- segment length


def segment_seconds(seconds, task, choice, limit=float("inf")):
    given = Recording(seconds, None, task)
    return long_form.with_segments(FakeCapacity(limit), given, 100.0, choice).segment_seconds


@pytest.mark.parametrize(
    ("seconds", "task", "choice", "length"),
    [
        (90, "asr", "auto", None),
        (101, "asr", "auto", 50.0),
        (9000, "asr", "none", None),
        (9000, "ssum", "auto", None),
        (90, "ast", "25", 25.0),
    ],
)
def test_segment_length_by_flag(seconds, task, choice, length):
    assert segment_seconds(seconds, task, choice) == length


def test_auto_halves_segments_until_they_fit():
    assert segment_seconds(90, "asr", "auto", limit=500) == 45.0


@pytest.mark.parametrize(
    ("task", "choice", "remedy"),
    [
        ("asr", "none", "use segments (--span=auto)"),
        ("asr", "90", "use segments shorter than 90 s (--span=SECONDS)"),
        ("ssum", "auto", "cut the recording: ssum needs it as a whole"),
    ],
)
def test_a_recording_that_does_not_fit_names_the_remedy(task, choice, remedy):
    with pytest.raises(CapacityError) as raised:
        segment_seconds(90, task, choice, limit=100)
    assert str(raised.value).startswith("a recording of 1.5 minutes: ")
    assert str(raised.value).endswith(f" positions are needed, or {remedy}")


@pytest.mark.parametrize("choice", ["some", "0.5", "nan", "inf"])
@pytest.mark.parametrize("task", ["asr", "ssum"])
def test_bad_segment_lengths_are_rejected(choice, task):
    with pytest.raises(UserError, match=f"--span={choice}: use auto, none, or a number"):
        segment_seconds(90, task, choice)


def test_trained_seconds():
    short, long = {"path": "a"}, {"path": "a", "join": {"max_seconds": 900.0}}
    assert long_form.trained_seconds({"short": short, "long": long}, 30.0) == 900.0
    assert long_form.trained_seconds({"short": short}, 30.0) == 30.0
    assert long_form.trained_seconds({}, 30.0) == 900.0
