"""The long-form plan: every clip once, lengths in their range, clips grouped and ordered as asked."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from fastslm_jax.data import longform, semantic
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.manifest import Segment, Utterance
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
    runs = {"random": 1, "speaker": 3, "recording": 6, "semantic": 1}[grouping]
    assert sum(length < 15.0 - 6.6 for length in lengths) <= runs
    assert len({round(length, 3) for length in lengths}) > 5


def test_gaps_are_drawn_between_clips():
    examples = joined(LongForm(15.0, 30.0, gap_seconds=(0.25, 0.5)))
    assert all(
        len(example.gaps) == len(example.clips) and example.gaps[0] == 0 for example in examples
    )
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
        assert all(
            later - earlier == 10.0 for earlier, later in itertools.pairwise(offsets)
        )  # neighbours


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
    with pytest.raises(
        UserError, match="grouping 'topic' is not one of random, speaker, recording, semantic"
    ):
        LongForm(10.0, 20.0, "topic")
    with pytest.raises(UserError, match=r"long-form lengths 20.0 … 10.0 s are not a range"):
        LongForm(20.0, 10.0)
    with pytest.raises(UserError, match="distribution 'normal' is not one of uniform, log_uniform"):
        LongForm(10.0, 20.0, distribution="normal")
    with pytest.raises(UserError, match=r"gaps of \(0.5, 0.2\) s are not a range"):
        LongForm(10.0, 20.0, gap_seconds=(0.5, 0.2))


def test_log_uniform_lengths_have_as_many_in_every_octave():
    rng, plan = np.random.default_rng(0), LongForm(60.0, 960.0, distribution="log_uniform")
    octaves = np.histogram([plan.draw(rng) for _ in range(4000)], [60, 120, 240, 480, 960])[0]
    assert octaves.sum() == 4000
    assert octaves.min() > 900


# ------------------------------------------------------------------------------------------------------------ by topic

TOPICS = (
    "harbour boat sail anchor tide captain".split(),
    "oven bread flour butter sugar recipe".split(),
    "engine wheel brake petrol gear motor".split(),
    "goal referee striker penalty match crowd".split(),
)


def on_topics(count: int) -> list[Utterance]:
    """Clips of 3 s, topic by topic in turn: four words of the topic among words that all share."""
    rng, index = np.random.default_rng(1), []
    for number in range(count):
        words = [*rng.choice(TOPICS[number % 4], 4), "the", "and", f"name{number}"]
        text = " ".join(rng.permutation(words))
        index.append(dataclasses.replace(utterance(number), seconds=3.0, text=text, answer=text))
    return index


def test_semantic_grouping_joins_what_is_alike():
    index, plan = on_topics(400), LongForm(30.0, 30.0, "semantic", gap_seconds=(0.0, 0.0))
    examples = longform.joined_examples(0, index, plan, np.random.default_rng(0))
    assert sorted(clip for example in examples for clip in example.clips) == list(range(400))
    pure = [
        max(collections.Counter(clip % 4 for clip in example.clips).values()) / len(example.clips)
        for example in examples
    ]
    assert np.mean(pure) > 0.85
    random = longform.joined_examples(
        0, index, dataclasses.replace(plan, grouping="random"), np.random.default_rng(0)
    )
    assert (
        np.mean(
            [
                max(collections.Counter(c % 4 for c in e.clips).values()) / len(e.clips)
                for e in random
            ]
        )
        < 0.5
    )
    again = longform.joined_examples(0, index, plan, np.random.default_rng(0))
    assert again == examples != longform.joined_examples(0, index, plan, np.random.default_rng(1))


def test_texts_without_a_telling_word_are_ordered_too():
    vectors = semantic.vectors(["", "yes", "no", "yes", "..."] * 20)
    assert sorted(semantic.order(vectors, np.random.default_rng(0))) == list(range(100))


# ------------------------------------------------------------------------------------------------------------ rows' limits


def test_a_recording_ends_before_the_clip_that_no_row_would_take():
    plan, tokens = (
        LongForm(60.0, 60.0, gap_seconds=(0.0, 0.0)),
        [number % 7 for number in range(60)],
    )
    takes = lambda first, samples, tokens: tokens <= 20 and samples <= 40 * SAMPLES  # noqa: E731
    examples = longform.joined_examples(
        0, INDEX, plan, np.random.default_rng(0), tokens=tokens, takes=takes
    )
    assert sorted(clip for example in examples for clip in example.clips) == list(range(60))
    assert max(seconds(example) for example in examples) <= 40.0
    sums = [sum(tokens[clip] for clip in example.clips) for example in examples]
    assert max(sums) <= 20
    assert sorted(sums)[len(sums) // 2] >= 15


def test_a_long_recording_is_split_at_its_segments():
    parts = [
        Segment(0.0, 20.0, "one"),
        Segment(21.0, 40.0, "two"),
        Segment(40.5, 60.0, "three"),
        Segment(60.0, 70.0, "four"),
    ]
    text = "one two three four"
    whole = dataclasses.replace(
        utterance(0),
        seconds=71.0,
        text=text,
        answer=text,
        segments=tuple(parts),
        id="tape",
        offset=5.0,
    )
    pieces = longform.split(whole, lambda piece: piece.seconds <= 45)
    assert [(p.id, p.offset, p.seconds, p.answer) for p in pieces] == [
        ("tape.1", 5.0, 40.0, "one two"),
        ("tape.2", 45.5, 29.5, "three four"),
    ]
    assert pieces[1].segments == (Segment(0.0, 19.5, "three"), Segment(19.5, 29.5, "four"))
    assert (
        longform.split(whole, lambda piece: piece.seconds <= 15) == []
    )  # nothing is cut inside a segment
    assert longform.split(dataclasses.replace(whole, segments=()), lambda piece: True) == []
    assert (
        longform.split(dataclasses.replace(whole, task="ast", answer="eins"), lambda piece: True)
        == []
    )
