"""The curve of WER: exact on a power law, and errors for what it cannot use."""

import json
import math

import asr_predictions
import learning_curve
import numpy as np
import pytest
from absl.testing import flagsaver

from fastslm_jax.errors import UserError

FLAGS = asr_predictions.FLAGS
WORDS = "zero one two three four five six seven".split()


@pytest.fixture(autouse=True, scope="module")
def references():
    """The flag of all scripts that read predictions."""
    if "references" not in FLAGS:
        asr_predictions.define_flags()
    if not FLAGS.is_parsed():
        FLAGS(["test"])


def predictions(path, wrong):
    """Two utterances of eight different words, the first with `wrong` wrong ones."""
    heard = ["x"] * wrong + WORDS[wrong:]
    known = {"task": "asr", "lang": "de", "seconds": 2.0, "stop_reason": "eos"}
    known["reference"] = " ".join(WORDS)
    lines = [
        known | {"id": id, "hypothesis": " ".join(words)}
        for id, words in (("a", heard), ("b", WORDS))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_errors_are_counted_over_the_set(tmp_path):
    files = [predictions(tmp_path / f"{n}.jsonl", wrong=n) for n in (8, 2)]
    found = learning_curve.errors_and_words(files)
    np.testing.assert_array_equal(found, [[[800, 8], [0, 8]], [[200, 8], [0, 8]]])


def test_a_power_law_is_found_and_continued():
    counts = np.array([1000.0, 2000.0, 8000.0])
    log_a, b = learning_curve.fit(counts, 40 * (counts / 1000) ** -0.5)
    assert b == pytest.approx(0.5)
    assert learning_curve.count_at(4.0, log_a, b) == pytest.approx(100_000)


def test_a_curve_that_does_not_fall_never_reaches_the_target():
    wers = np.array([[30.0, 30.0], [30.0, 31.0]])
    log_a, b = learning_curve.fit(np.array([1.0, 2.0]), wers)
    assert all(map(math.isinf, learning_curve.count_at(20.0, log_a, b)))


@pytest.mark.parametrize("argument", ["FILE", "0=FILE", "-1=FILE", "x=FILE", "5="])
def test_an_argument_must_be_a_count_and_a_file(argument):
    with pytest.raises(UserError, match="is not COUNT=FILE"):
        learning_curve.parse(argument)


def test_files_must_be_of_the_same_utterances(tmp_path):
    first = predictions(tmp_path / "1.jsonl", wrong=1)
    second = tmp_path / "2.jsonl"
    second.write_text(first.read_text().replace('"id": "a"', '"id": "c"'))
    with pytest.raises(UserError, match=r"2.jsonl: does not have the utterances of .*1.jsonl"):
        learning_curve.errors_and_words([first, second])


@flagsaver.flagsaver
def test_a_text_file_keeps_its_sentences(tmp_path):
    file = predictions(tmp_path / "1.jsonl", wrong=1)
    FLAGS.references = str(tmp_path / "lines.txt")
    (tmp_path / "lines.txt").write_text(f"{' '.join(WORDS)}\n")
    assert len(asr_predictions.read(file)) == 2
    (tmp_path / "lines.txt").write_text("another sentence\n")
    with pytest.raises(UserError, match=r"none of its utterances is a line of .*lines\.txt"):
        asr_predictions.read(file)


def test_other_tasks_are_refused(tmp_path):
    file = predictions(tmp_path / "1.jsonl", wrong=1)
    file.write_text(file.read_text().replace('"asr"', '"ast"', 1))
    with pytest.raises(UserError, match="needs speech recognition in one language"):
        asr_predictions.read(file)
