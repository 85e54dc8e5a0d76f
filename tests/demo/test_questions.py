"""Spoken questions with exact answers."""

import random

from fastslm_jax.demo import examples


def test_answers_are_spoken_in_the_statement():
    for seed in range(300):
        example = examples.draw_example("sqqa", random.Random(seed))
        assert f" {example.answer} " in f" {example.text} "
