"""Spoken notes with summaries."""

import random

from fastslm_jax.demo import examples, phrases


def test_summaries_count_and_name_the_notes():
    for seed in range(100):
        example = examples.draw_example("ssum", random.Random(seed))
        count = example.text.split().count("note")
        first, *rest = example.answer.split()
        assert (phrases.ONES[count], "notes") == (first, rest[0])
        assert len(rest) == 1 + 2 * count
        assert set(rest[1:]) <= set(example.text.split())
