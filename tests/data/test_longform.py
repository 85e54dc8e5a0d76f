"""Planning of long recordings: lengths, gaps, groupings, and splitting at segments."""

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
    """Clips of 2 to 6 s, three alternating speakers, recordings of ten clips in reverse order."""
    recording, position = divmod(number, 10)
    return Utterance(
        path="a.flac",
        offset=100.0 - 10 * position,
        seconds=2.0 + number % 5,
        task="asr",
        instruction=None,
        answer="a",
        text="a",
        lang="en",
        speaker=f"speaker {number % 3}",
        recording=f"recording {recording}",
        id=str(number),
    )


INDEX = [utterance(number) for number in range(60)]


def joined(plan: LongForm, seed: int = 0):
    return longform.joined_examples(0, INDEX, plan, np.random.default_rng(seed))


def seconds(example: longform.Example) -> float:
    return sum(INDEX[clip].seconds for clip in example.clips) + sum(example.gaps) / SAMPLES


def test_single_examples_are_all_clips_in_random_order():
    examples = longform.single_examples(3, 20, np.random.default_rng(0))
    assert sorted(example.clips for example in examples) == [(clip,) for clip in range(20)]
    assert [example.clips[0] for example in examples] != list(range(20))
    assert all((example.source, example.gaps) == (3, (0,)) for example in examples)


@pytest.mark.parametrize("grouping", longform.GROUPINGS)
def test_every_clip_is_used_once_and_lengths_are_in_range(grouping):
    examples = joined(LongForm(15.0, 30.0, grouping))
    assert sorted(clip for example in examples for clip in example.clips) == list(range(60))
    lengths = [seconds(example) for example in examples]
    assert max(lengths) <= 30.0
    # A recording is at most one clip (6 s) and one gap (0.6 s) shorter than its drawn length,
    # except the last one of every run.
    runs = {"random": 1, "speaker": 3, "recording": 6, "semantic": 1}[grouping]
    assert sum(length < 15.0 - 6.6 for length in lengths) <= runs
    assert len({round(length, 3) for length in lengths}) > 5


def test_gaps_are_drawn_from_their_range():
    examples = joined(LongForm(15.0, 30.0, gap_seconds=(0.25, 0.5)))
    assert all(
        len(example.gaps) == len(example.clips) and example.gaps[0] == 0 for example in examples
    )
    gaps = np.array([gap for example in examples for gap in example.gaps[1:]]) / SAMPLES
    assert gaps.min() >= 0.25
    assert gaps.max() <= 0.5
    assert gaps.std() > 0.02


def test_grouping_by_speaker_does_not_mix_speakers():
    for example in joined(LongForm(15.0, 30.0, "speaker")):
        assert len({INDEX[clip].speaker for clip in example.clips}) == 1


def test_grouping_by_recording_keeps_the_original_order():
    for example in joined(LongForm(15.0, 30.0, "recording")):
        assert len({INDEX[clip].recording for clip in example.clips}) == 1
        offsets = [INDEX[clip].offset for clip in example.clips]
        assert offsets == sorted(offsets)
        assert all(later - earlier == 10.0 for earlier, later in itertools.pairwise(offsets))


def test_random_grouping_mixes_speakers():
    examples = joined(LongForm(15.0, 30.0, "random"))
    assert any(len({INDEX[clip].speaker for clip in example.clips}) > 1 for example in examples)


def test_a_clip_longer_than_the_range_is_an_example_by_itself():
    examples = joined(LongForm(1.0, 1.5))
    assert sorted(example.clips for example in examples) == [(clip,) for clip in range(60)]


def test_the_plan_depends_on_the_seed_only():
    plan = LongForm(15.0, 30.0)
    assert joined(plan, seed=1) == joined(plan, seed=1) != joined(plan, seed=2)


def test_invalid_settings():
    with pytest.raises(
        UserError, match="grouping 'topic' is not one of random, speaker, recording, semantic"
    ):
        LongForm(10.0, 20.0, "topic")
    with pytest.raises(UserError, match=r"min_seconds 20.0 and max_seconds 10.0 are not a range"):
        LongForm(20.0, 10.0)
    with pytest.raises(UserError, match="distribution 'normal' is not one of uniform, log_uniform"):
        LongForm(10.0, 20.0, distribution="normal")
    with pytest.raises(UserError, match=r"gap_seconds \(0.5, 0.2\) is not a range"):
        LongForm(10.0, 20.0, gap_seconds=(0.5, 0.2))


def test_log_uniform_lengths_are_equally_frequent_in_every_octave():
    rng, plan = np.random.default_rng(0), LongForm(60.0, 960.0, distribution="log_uniform")
    octaves = np.histogram([plan.draw(rng) for _ in range(4000)], [60, 120, 240, 480, 960])[0]
    assert octaves.sum() == 4000
    assert octaves.min() > 900


# ---- Semantic grouping

TOPICS = (
    "harbour boat sail anchor tide captain".split(),
    "oven bread flour butter sugar recipe".split(),
    "engine wheel brake petrol gear motor".split(),
    "goal referee striker penalty match crowd".split(),
)


def utterances_by_topic(count: int) -> list[Utterance]:
    """Clips of 3 s with alternating topics: four words of the topic among common words."""
    rng, index = np.random.default_rng(1), []
    for number in range(count):
        words = [*rng.choice(TOPICS[number % 4], 4), "the", "and", f"name{number}"]
        text = " ".join(rng.permutation(words))
        index.append(dataclasses.replace(utterance(number), seconds=3.0, text=text, answer=text))
    return index


def mean_topic_purity(examples: list[longform.Example]) -> float:
    """Mean share of the most frequent topic in a recording."""
    counts = [collections.Counter(clip % 4 for clip in example.clips) for example in examples]
    return np.mean([max(count.values()) / sum(count.values()) for count in counts])


def test_semantic_grouping_joins_clips_of_one_topic():
    index = utterances_by_topic(400)
    plan = LongForm(30.0, 30.0, "semantic", gap_seconds=(0.0, 0.0))
    examples = longform.joined_examples(0, index, plan, np.random.default_rng(0))
    assert sorted(clip for example in examples for clip in example.clips) == list(range(400))
    assert mean_topic_purity(examples) > 0.85
    random = longform.joined_examples(
        0, index, dataclasses.replace(plan, grouping="random"), np.random.default_rng(0)
    )
    assert mean_topic_purity(random) < 0.5
    again = longform.joined_examples(0, index, plan, np.random.default_rng(0))
    assert again == examples != longform.joined_examples(0, index, plan, np.random.default_rng(1))


def test_texts_without_informative_words_are_ordered_too():
    vectors = semantic.tf_idf(["", "yes", "no", "yes", "..."] * 20)
    assert sorted(semantic.similarity_order(vectors, np.random.default_rng(0))) == list(range(100))


# ---- Limits of rows


def test_a_recording_ends_before_it_exceeds_a_row():
    plan = LongForm(60.0, 60.0, gap_seconds=(0.0, 0.0))
    tokens = [number % 7 for number in range(60)]

    def fits(first: int, samples: int, tokens: int) -> bool:
        return tokens <= 20 and samples <= 40 * SAMPLES

    examples = longform.joined_examples(
        0, INDEX, plan, np.random.default_rng(0), tokens=tokens, fits=fits
    )
    assert sorted(clip for example in examples for clip in example.clips) == list(range(60))
    assert max(seconds(example) for example in examples) <= 40.0
    sums = [sum(tokens[clip] for clip in example.clips) for example in examples]
    assert max(sums) <= 20
    assert sorted(sums)[len(sums) // 2] >= 15


def test_a_long_recording_is_split_at_its_segments():
    segments = (
        Segment(0.0, 20.0, "one"),
        Segment(21.0, 40.0, "two"),
        Segment(40.5, 60.0, "three"),
        Segment(60.0, 70.0, "four"),
    )
    text = "one two three four"
    whole = dataclasses.replace(
        utterance(0),
        seconds=71.0,
        text=text,
        answer=text,
        segments=segments,
        id="tape",
        offset=5.0,
    )
    pieces = longform.split(whole, lambda piece: piece.seconds <= 45)
    assert [(p.id, p.offset, p.seconds, p.answer) for p in pieces] == [
        ("tape.1", 5.0, 40.0, "one two"),
        ("tape.2", 45.5, 29.5, "three four"),
    ]
    assert pieces[1].segments == (Segment(0.0, 19.5, "three"), Segment(19.5, 29.5, "four"))
    assert longform.split(whole, lambda piece: piece.seconds <= 15) == []  # segments stay whole
    without_segments = dataclasses.replace(whole, segments=())
    assert longform.split(without_segments, lambda piece: True) == []
    translation = dataclasses.replace(whole, task="ast", answer="eins")
    assert longform.split(translation, lambda piece: True) == []
    lost = dataclasses.replace(whole, text=f"{text} five", answer=f"{text} five")
    with pytest.raises(UserError, match=r"^tape: .* its segments do not contain the words of its"):
        longform.split(lost, lambda piece: piece.seconds <= 45)
