"""Synthetic corpora from sentences: files, manifests, resumption and settings."""

import json
import shutil

import numpy as np
import pytest

from fastslm_jax.data.contamination import words
from fastslm_jax.data.manifest import read_clip, read_manifest
from fastslm_jax.errors import UserError
from fastslm_jax.synthesis import corpus, engines
from fastslm_jax.synthesis.corpus import Recipe

pytest.importorskip("espeakng_loader")

SENTENCES = tuple(
    "call anna|press two now|no|yes, please|the blue lamp|turn left|good night".split("|")
)


def recipe(**changes) -> Recipe:
    settings = {"no_speech": 0.25, "dev": 0.3, "voices": (engines.parse("espeak"),)}
    return Recipe(SENTENCES, **settings | changes)


def contents(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A corpus of 30 clips: (its folder, its summary)."""
    out = tmp_path_factory.mktemp("built") / "corpus"
    return out, corpus.build(recipe(), out, 30)


def test_manifests_are_readable_and_clips_have_their_fields(built):
    out, summary = built
    train, dev = (read_manifest(out / f"{split}.jsonl") for split in ("train", "dev"))
    assert len(train) + len(dev) == 30
    for utterance in [*train, *dev]:
        samples = read_clip(utterance)
        assert len(samples) == utterance.num_samples
        assert samples.any()
        assert utterance.no_speech == (not utterance.text)
        assert utterance.speaker.startswith("no-speech-" if utterance.no_speech else "espeak-en")
        assert utterance.recording == utterance.id
    assert {u.text for u in train if u.text}.isdisjoint(u.text for u in dev)
    spoken = [u for u in [*train, *dev] if u.text]
    assert {u.text for u in spoken} == set(SENTENCES)
    assert summary["engines"] == {"espeak": len(spoken)}
    assert (summary["clips"], summary["no_speech"]) == (30, 30 - len(spoken))
    assert (summary["train"], summary["dev"]) == (len(train), len(dev))
    assert (summary["sentences"], summary["vocabulary"]) == (7, 15)
    assert summary["words"] == sum(len(words(u.text)) for u in spoken)
    assert json.loads((out / "summary.json").read_text()) == summary


def test_an_interrupted_build_resumes_with_the_same_files(built, tmp_path, monkeypatch):
    """Also with another number of clips at first: clips do not depend on each other."""
    out = tmp_path / "corpus"
    corpus.build(recipe(), out, 12)
    before = contents(out)
    real = corpus._build_clip

    def stop_at_20(recipe, folder, index):
        if index == 20:
            raise KeyboardInterrupt
        return real(recipe, folder, index)

    monkeypatch.setattr(corpus, "_build_clip", stop_at_20)
    with pytest.raises(KeyboardInterrupt):
        corpus.build(recipe(), out, 30)
    monkeypatch.undo()
    assert sum(name.endswith(".flac") for name in contents(out)) == 20
    corpus.build(recipe(), out, 30)
    after = contents(out)
    assert after == contents(built[0])
    assert all(after[name] == before[name] for name in before if name.endswith(".flac"))


def test_the_number_of_processes_does_not_matter(built, tmp_path):
    out = tmp_path / "corpus"
    corpus.build(recipe(), out, 30, workers=2)
    assert contents(out) == contents(built[0])


def test_another_seed_gives_other_clips():
    plans = [[corpus.plan(recipe(seed=seed), i) for i in range(20)] for seed in (0, 1)]
    texts = [[clip.text for clip in clips] for clips in plans]
    assert texts[0] != texts[1]
    one, same = corpus.plan(recipe(), 3).render(), corpus.plan(recipe(), 3).render()
    np.testing.assert_array_equal(one, same)


def test_shares_of_voices_and_of_clips_without_speech():
    groups = ((engines.Voice("a", "1"),), tuple(engines.Voice("b", str(i)) for i in range(9)))
    clips = [corpus.plan(recipe(voices=groups, no_speech=0.05), i) for i in range(4000)]
    spoken = [clip for clip in clips if clip.voice]
    assert 1 - len(spoken) / 4000 == pytest.approx(0.05, abs=0.01)
    assert np.mean([c.voice.engine == "a" for c in spoken]) == pytest.approx(0.5, abs=0.03)
    counts = np.array([sum(c.text == sentence for c in spoken) for sentence in SENTENCES])
    assert counts.max() / counts.min() < 1.1
    assert all(0.85 <= clip.speed <= 1.2 for clip in spoken)


def test_a_folder_with_other_settings_is_not_overwritten(built, tmp_path):
    message = "has a corpus with a different seed, no_speech; choose another --out or remove"
    with pytest.raises(UserError, match=message):
        corpus.build(recipe(seed=5, no_speech=0.0), built[0], 30)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="contains other files; choose another --out"):
        corpus.build(recipe(), tmp_path, 30)


def test_clips_that_cannot_be_made_are_left_out_and_counted(tmp_path):
    summary = corpus.build(recipe(max_seconds=1.2, no_speech=0.0), tmp_path / "a", 20)
    assert summary["left_out"] == {"longer than 1.2 s": 20 - summary["clips"]}
    assert 0 < summary["clips"] < 20


def test_an_engine_that_fails_often_is_an_error(tmp_path, monkeypatch):
    class Moody(engines.Engine):
        name = "moody"

        def speak(self, text, voice, speed=1.0):
            if text == "no":
                raise engines.EngineError("moody: does not say no")
            return np.ones(16_000, np.float32), 16_000

    monkeypatch.setitem(engines.ENGINES, "moody", Moody())
    moody = recipe(voices=((engines.Voice("moody", "a"),),), no_speech=0.0)
    message = r"2 of 14 clips could not be made \(first: moody: does not say no\)"
    with pytest.raises(UserError, match=message):
        corpus.build(moody, tmp_path / "a", 14)
    shutil.rmtree(tmp_path / "a")
    monkeypatch.setattr(Moody, "speak", lambda *a, **k: (np.zeros(10, np.float32), 16_000))
    with pytest.raises(UserError, match="moody-a: returned no sound for 'hello'"):
        corpus.build(moody, tmp_path / "a", 14)
