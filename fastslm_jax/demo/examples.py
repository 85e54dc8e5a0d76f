"""Text of the synthetic corpus: examples of all tasks in disjoint train, dev and test splits.

Every example is a pure function of a `random.Random`. Its split is a hash of the spoken words, so
the splits are disjoint for every seed.

    >>> draw_example("ast", random.Random(3), "train").answer
    '금요일 전에 제 사촌에게 요리법을 보내 주세요'
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Iterator, Sequence

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import notes, questions, sentences

SPLITS = ("train", "dev", "test")
# Bounds the spoken length: at the slowest voice the speech fits into `recordings.MAX_SECONDS`,
# except for long questions, which are spoken faster.
MAX_SYLLABLES = {
    "asr": sentences.MAX_SYLLABLES,
    "ast": sentences.MAX_SYLLABLES,
    "ssum": 44,
    "sqqa": 29,
}


@dataclasses.dataclass(frozen=True)
class SpokenExample:
    """`text` is what is spoken, `answer` is the target and `lang` is the language of the answer."""

    task: str
    text: str
    prompt: str
    answer: str
    lang: str = "en"


def split_of(text: str) -> str:
    """The split of a spoken text, by its hash: 80 % train, 10 % dev, 10 % test."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 80 else "dev" if bucket < 90 else "test"


def draw_example(task: str, rng: random.Random, split: str | None = None) -> SpokenExample:
    """Draws an example of a task; with `split`, one whose spoken words belong to that split."""
    while True:
        if task in ("asr", "ast"):
            drawn = sentences.sentence(rng)
            text, answer = drawn.en, drawn.en if task == "asr" else drawn.ko
        elif task == "ssum":
            text, answer = notes.notes_and_summary(rng)
        elif task == "sqqa":
            is_train = split == "train"
            text, answer = questions.facts_and_question(
                rng, questions.P_DISTRACTOR_TRAIN if is_train else questions.P_DISTRACTOR
            )
        else:
            raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
        fits = sentences.count_syllables(text) <= MAX_SYLLABLES[task]
        if fits and split in (None, split_of(text)):
            lang = "ko" if task == "ast" else "en"
            return SpokenExample(task, text, TASKS[task].instruction, answer, lang)


def text_examples(
    split: str, seed: int, count: int, tasks: Sequence[str] = tuple(TASKS)
) -> Iterator[SpokenExample]:
    """Text-only examples of a split, cycling through the tasks."""
    rng = random.Random(f"text/{seed}/{split}")
    for i in range(count):
        yield draw_example(tasks[i % len(tasks)], rng, split)


@functools.cache
def lexicon(tasks: tuple[str, ...] = tuple(TASKS)) -> tuple[str, ...]:
    """All English words of the tasks, sorted. Samples far more text than the rarest word needs."""
    rng = random.Random("lexicon")
    texts = (draw_example(task, rng).text for task in tasks for _ in range(6000))
    return tuple(sorted({word for text in texts for word in text.split()}))
