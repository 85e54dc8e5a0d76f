"""Lines of one to three words."""

import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.synthesis import words


def test_the_vocabulary_is_of_words_that_occur_often():
    lines = ["Don’t run, I said.", "don't RUN 22!", "a run; don't 22 22"]
    assert words.vocabulary(lines) == ["don't", "run"]
    assert words.vocabulary(["one two", "two one two"]) == ["two"]


def test_most_lines_are_single_words():
    known = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]
    lines = words.draw(known, 150)
    assert len(set(lines)) == 150
    sizes = [len(line.replace(",", "").split()) for line in lines]
    assert (sizes.count(1), set(sizes)) == (90, {1, 2, 3})
    assert all(line[0].isupper() and line.endswith(".") for line in lines)
    assert {line.strip(".").lower() for line in lines if " " not in line} <= set(known)
    assert words.draw(known, 150) == lines
    assert words.draw(known, 150, seed=1) != lines


@pytest.mark.parametrize(("known", "count"), [([], 1), (["one", "two"], 5)])
def test_too_few_words_are_an_error(known, count):
    with pytest.raises(UserError, match=f"have {len(known)} words that occur at least 3 times"):
        words.draw(known, count)


def test_a_small_vocabulary_gives_all_that_it_can():
    assert len(set(words.draw(["one", "two"], 4))) == 4
