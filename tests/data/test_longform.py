"""The long-form plan: every clip once, lengths in their range, clips grouped and ordered as asked."""

import itertools

import numpy as np
import pytest

from fastslm_jax.data import longform
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.manifest import Utterance
from fastslm_jax.errors import UserError

SAMPLES = 16_000


def utterance(number: int) -> Utterance:
    """Clips of 2 … 6 s; three speakers in turn; recordings of ten clips, listed last clip first."""
    recording, place = divmod(number, 10)
    return Utterance(
        path="a.flac", offset=100.0 - 10 * place, seconds=2.0 + number % 5, task="asr", instruction=None, answer="a", text="a",
        lang="en", speaker=f"speaker {number % 3}", recording=f"recording {recording}", id=str(number),
    )  # fmt: skip


INDEX = [utterance(number) for number in range(60)]


def joined(plan: LongForm, seed: int = 0):
    return longform.joined_examples(0, INDEX, plan, np.random.default_rng(seed))


def seconds(example: longform.Example) -> float:
    return sum(INDEX[clip].seconds for clip in example.clips) + sum(example.gaps) / SAMPLES


def test_single_examples_are_every_clip_once_in_random_order():
    examples = longform.single_examples(3, 20, np.random.default_rng(0))
    assert sorted(example.clips for example in examples) == [(clip,) for clip in range(20)]
    assert [example.clips[0] for example in examples] != list(range(20))
    assert all((example.source, example.gaps) == (3, (0,)) for example in examples)


@pytest.mark.parametrize("grouping", longform.GROUPINGS)
def test_every_clip_once_in_recordings_of_the_asked_length(grouping):
    examples = joined(LongForm(15.0, 30.0, grouping))
    assert sorted(clip for example in examples for clip in example.clips) == list(range(60))
    lengths = [seconds(example) for example in examples]
    assert max(lengths) <= 30.0
    # A recording ends where the next clip, 6 s at most after 0.6 s, would pass its target; a run's last one may be shorter.
    runs = {"random": 1, "speaker": 3, "recording": 6}[grouping]
    assert sum(length < 15.0 - 6.6 for length in lengths) <= runs
    assert len({round(length, 3) for length in lengths}) > 5


def test_gaps_are_drawn_between_clips():
    examples = joined(LongForm(15.0, 30.0, gap_seconds=(0.25, 0.5)))
    assert all(len(example.gaps) == len(example.clips) and example.gaps[0] == 0 for example in examples)
    gaps = np.array([gap for example in examples for gap in example.gaps[1:]]) / SAMPLES
    assert gaps.min() >= 0.25
    assert gaps.max() <= 0.5
    assert gaps.std() > 0.02


def test_grouping_by_speaker_never_mixes_voices():
    for example in joined(LongForm(15.0, 30.0, "speaker")):
        assert len({INDEX[clip].speaker for clip in example.clips}) == 1


def test_grouping_by_recording_keeps_the_real_order():
    for example in joined(LongForm(15.0, 30.0, "recording")):
        assert len({INDEX[clip].recording for clip in example.clips}) == 1
        offsets = [INDEX[clip].offset for clip in example.clips]
        assert offsets == sorted(offsets)
        assert all(later - earlier == 10.0 for earlier, later in itertools.pairwise(offsets))  # neighbours


def test_random_grouping_mixes_voices():
    examples = joined(LongForm(15.0, 30.0, "random"))
    assert any(len({INDEX[clip].speaker for clip in example.clips}) > 1 for example in examples)


def test_a_clip_longer_than_the_range_stands_alone():
    examples = joined(LongForm(1.0, 1.5))
    assert sorted(example.clips for example in examples) == [(clip,) for clip in range(60)]


def test_the_plan_is_a_function_of_the_seed():
    plan = LongForm(15.0, 30.0)
    assert joined(plan, seed=1) == joined(plan, seed=1) != joined(plan, seed=2)


def test_plans_that_make_no_sense():
    with pytest.raises(UserError, match="grouping 'topic' is not one of random, speaker, recording"):
        LongForm(10.0, 20.0, "topic")
    with pytest.raises(UserError, match=r"long-form lengths 20.0 … 10.0 s are not a range"):
        LongForm(20.0, 10.0)
