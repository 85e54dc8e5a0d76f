"""Examples of all tasks: reproducible, with disjoint splits."""

import itertools
import random

from fastslm_jax.demo import examples


def test_lexicon_size():
    words = examples.lexicon(("asr",))
    assert 200 <= len(words) <= 250
    assert set(words) <= set(examples.lexicon())
    assert all(
        word.isascii() and word.isalpha() and word == word.lower() for word in examples.lexicon()
    )


def test_examples_are_a_function_of_the_rng():
    example = examples.draw_example("asr", random.Random(1))
    assert example.text == "i would like six eggs and three white lamps please"
    assert example.answer == "i would like six eggs and three white lamps please"
    example = examples.draw_example("ast", random.Random(1))
    assert example.text == "i would like six eggs and three white lamps please"
    assert example.answer == "달걀 여섯 개와 하얀 램프 세 개를 주세요"
    example = examples.draw_example("ssum", random.Random(1))
    assert example.text == "note one send the letter to julia note two meet martin at the beach"
    assert example.answer == "two notes send letter meet martin"
    example = examples.draw_example("sqqa", random.Random(1))
    assert example.text == "julia bought six chairs in berlin how many chairs did julia buy"
    assert example.answer == "six"


def test_text_splits_are_disjoint_for_different_seeds():
    texts = {
        split: {e.text for e in examples.text_examples(split, seed, 400)}
        for seed, split in enumerate(examples.SPLITS)
    }
    assert all(texts[a].isdisjoint(texts[b]) for a, b in itertools.combinations(examples.SPLITS, 2))
    assert {split: {examples.split_of(t) for t in found} for split, found in texts.items()} == {
        s: {s} for s in examples.SPLITS
    }
