"""Questions about the words of clips, and the command that writes their manifest."""

import json

import numpy as np
import pytest
import soundfile
from absl import flags

from fastslm_jax.data import questions
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.errors import UserError

SAID = ("press", "two", "for", "two", "sales")
RIGHT = {
    "What is the first word?": {"press"},
    "What is the last word?": {"sales"},
    'Which word follows "press"?': {"two"},
    'Which word follows "for"?': {"two"},
    "How many words are said?": {"five"},
    "Is anybody speaking?": {"yes"},
} | {f'Is the word "{word}" said?': {"yes"} for word in SAID}


def test_every_answer_is_right():
    """Words that are said twice are not asked for by what follows; all kinds occur."""
    asked = {}
    for seed in range(300):
        question, answer = questions.ask(SAID, ("bell",), np.random.default_rng(seed))
        asked.setdefault(question, set()).add(answer)
    assert asked == RIGHT | {'Is the word "bell" said?': {"no"}}


def test_a_clip_without_speech_or_with_one_word():
    assert questions.ask((), SAID, np.random.default_rng(0)) == ("Is anybody speaking?", "no")
    asked = {questions.ask(("yes",), (), np.random.default_rng(seed))[0] for seed in range(100)}
    assert 'Which word follows "yes"?' not in asked
    assert "How many words are said?" in asked


@pytest.fixture
def manifest(tmp_path):
    lines = []
    for number, text in enumerate(("Press two.", "Which way?", "", "x " * 20)):
        soundfile.write(tmp_path / f"{number}.wav", np.full(16_000, 0.1), 16_000)
        line = {"audio_filepath": f"{number}.wav", "duration": 1.0, "text": text, "speaker": "a"}
        lines.append(line | ({} if text else {"no_speech": True}))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def seed():
    questions.define_flags()
    flags.FLAGS(["questions"])
    yield
    delattr(flags.FLAGS, "seed")


def test_the_manifest_of_questions(manifest, seed, capsys):
    questions.main(["questions", str(manifest)])
    asked = read_manifest(manifest.with_name("train_questions.jsonl"), ("sqqa",))
    assert [clip.path for clip in asked] == [clip.path for clip in read_manifest(manifest)]
    assert asked[2].instruction == "Is anybody speaking?"
    assert asked[2].answer == "no"
    assert not asked[2].no_speech  # the answer is a word, not silence
    assert "How many" not in asked[3].instruction  # twenty words
    assert capsys.readouterr().out.endswith(
        f"4 questions in {manifest.parent}/train_questions.jsonl\n"
    )


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; questions are written beside a manifest"):
        questions.main(["questions", str(tmp_path)])
