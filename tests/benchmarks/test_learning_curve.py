"""The curve of WER: exact on a power law, and errors for what it cannot use."""

import json
import math

import learning_curve
import numpy as np
import pytest

from fastslm_jax.errors import UserError

WORDS = "zero one two three four five six seven".split()


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
    found = learning_curve.errors_and_words(files, lines=None)
    np.testing.assert_array_equal(found, [[[800, 8], [0, 8]], [[200, 8], [0, 8]]])


def test_a_power_law_is_found_and_continued():
    counts = np.array([1000.0, 2000.0, 8000.0])
    b, reached = learning_curve.fit(counts, 40 * (counts / 1000) ** -0.5, target=4.0)
    assert b == pytest.approx(0.5)
    assert reached == pytest.approx(100_000)


def test_a_curve_that_does_not_fall_never_reaches_the_target():
    wers = np.array([[30.0, 30.0], [30.0, 31.0]])
    _, reached = learning_curve.fit(np.array([1.0, 2.0]), wers, target=20.0)
    assert all(map(math.isinf, reached))


@pytest.mark.parametrize("argument", ["FILE", "0=FILE", "-1=FILE", "x=FILE", "5="])
def test_an_argument_must_be_a_count_and_a_file(argument):
    with pytest.raises(UserError, match="is not COUNT=FILE"):
        learning_curve.parse(argument)


def test_files_must_be_of_the_same_utterances(tmp_path):
    first = predictions(tmp_path / "1.jsonl", wrong=1)
    second = tmp_path / "2.jsonl"
    second.write_text(first.read_text().replace('"id": "a"', '"id": "c"'))
    with pytest.raises(UserError, match=r"2.jsonl: does not have the utterances of .*1.jsonl"):
        learning_curve.errors_and_words([first, second], lines=None)


def test_a_text_file_without_their_sentences(tmp_path):
    file = predictions(tmp_path / "1.jsonl", wrong=1)
    with pytest.raises(UserError, match="none of its utterances is a line of --references"):
        learning_curve.errors_and_words([file], lines={"another sentence"})
