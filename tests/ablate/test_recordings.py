"""Long recordings, their clips, and the test sets of the robustness experiment."""

import pytest

from fastslm_jax.ablate import recordings, robustness
from fastslm_jax.data.manifest import read_clip, read_manifest
from fastslm_jax.demo import examples
from fastslm_jax.synthesis.manner import Manner

pytest.importorskip("espeakng_loader")


def test_recordings_and_their_clips(tmp_path):
    recordings.build(tmp_path, train={20.0: 2}, test={30.0: 1}, workers=1)
    (test,) = read_manifest(tmp_path / "test.jsonl")
    assert 24 < test.seconds <= 30
    assert test.text == " ".join(segment.text for segment in test.segments)
    train = read_manifest(tmp_path / "train.jsonl")
    assert len({utterance.recording for utterance in train}) == 2
    for name in {utterance.recording for utterance in train}:
        clips = [utterance for utterance in train if utterance.recording == name]
        assert len({utterance.speaker for utterance in clips}) == 1
        assert [c.offset for c in clips] == sorted(c.offset for c in clips)
    assert all(examples.split_of(utterance.text) == "train" for utterance in train)
    assert all(read_clip(utterance).any() for utterance in train[:2])
    before = (tmp_path / "test.jsonl").stat().st_mtime_ns
    recordings.build(tmp_path)  # finished
    assert (tmp_path / "test.jsonl").stat().st_mtime_ns == before


def test_every_strength_changes_something():
    assert [each.manner == Manner() for each in robustness.SETS].count(True) == 1
    assert len({each.name for each in robustness.SETS}) == len(robustness.SETS)
    for each in robustness.SETS[1:]:
        assert getattr(each.manner, each.effect) == each.strength


def test_held_out_sentences_are_of_the_test_split():
    sentences = robustness.held_out_sentences(20, 0)
    assert len(set(sentences)) == 20
    assert {examples.split_of(text) for text in sentences} == {"test"}
    assert sentences != robustness.held_out_sentences(20, 1)
