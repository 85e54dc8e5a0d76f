"""The grammar of prompts: numbers in words, many different sentences, one form."""

import re

import pytest

from fastslm_jax.data.contamination import words
from fastslm_jax.synthesis import prompts


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (205, "two hundred five"),
        (1000, "one thousand"),
        (12_340, "twelve thousand three hundred forty"),
        (999_999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_numbers(n, expected):
    assert prompts.number(n) == expected


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, "first"), (2, "second"), (13, "thirteenth"), (20, "twentieth"), (92, "ninety second")],
)
def test_ordinals(n, expected):
    assert prompts.ordinal(n) == expected


def test_sentences_are_different_and_a_longer_list_continues_a_shorter_one():
    many = prompts.prompts(5000, seed=3)
    assert len(set(many)) == 5000
    assert prompts.prompts(100, seed=3) == many[:100]
    assert prompts.prompts(100, seed=4) != many[:100]


def test_sentences_have_one_form():
    """A capital, a mark at the end, and letters only: numbers are words."""
    for sentence in prompts.prompts(5000):
        assert re.fullmatch(r"[A-Z][A-Za-z ,;:']*[.?]", sentence), sentence
        assert "  " not in sentence
        assert 1 <= len(words(sentence)) <= 45
        assert not re.search(r"\bi\b", sentence)


def test_there_are_more_than_100_000_sentences():
    """2 % of repeats in a sample of 20 000 would mean a million if all were equally frequent."""
    import random

    rng = random.Random(0)
    drawn = [prompts.draw(rng) for _ in range(20_000)]
    assert len(set(drawn)) > 14_000  # single words repeat often
    assert len({words(sentence) for sentence in drawn if len(words(sentence)) > 4}) > 9_500
