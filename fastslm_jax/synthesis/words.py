"""Single words, and lists of two or three, from the vocabulary of text files.

    python -m fastslm_jax.synthesis.words prompts.txt wordnet.txt --count=7500 > words.txt

Sentences let a model guess words from their neighbours; these lines do not. Three of five are a
single word, each once while there are enough.
"""

import collections
import random
from collections.abc import Iterable, Sequence

from absl import flags

from fastslm_jax import cli
from fastslm_jax.data import contamination
from fastslm_jax.errors import UserError

SINGLE = 0.6  # share of lines with one word
MIN_COUNT = 3  # in the texts: of rarer words, many are names or misspelled

FLAGS = flags.FLAGS


def vocabulary(lines: Iterable[str]) -> list[str]:
    """Words of two letters or more that occur MIN_COUNT times or more, in order of the texts."""
    counts = collections.Counter(word for line in lines for word in contamination.words(line))
    return [
        word
        for word, count in counts.items()
        if count >= MIN_COUNT and len(word) > 1 and word.replace("'", "").isalpha()
    ]


def draw(known: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Different lines, in random order: "Grind.", "March, seventeen.", "Betrayed eighth."

    Raises:
        UserError: the vocabulary is too small for so many lines.
    """
    # There are this many pairs, so that the loop below ends.
    if not known or count > len(known) ** 2:
        raise UserError(
            f"the texts have {len(known)} words that occur at least {MIN_COUNT} times, too few for "
            f"--count={count}; add texts, or lower --count"
        )
    rng = random.Random(f"words/{seed}")
    single = rng.sample(known, min(len(known), round(SINGLE * count)))
    found = dict.fromkeys(_written([word], rng) for word in single)
    while len(found) < count:
        size = rng.choice((2, 2, 2, 3))
        found.setdefault(_written([rng.choice(known) for _ in range(size)], rng))
    lines = list(found)
    rng.shuffle(lines)
    return lines


def _written(chosen: Sequence[str], rng: random.Random) -> str:
    text = rng.choice((", ", " ")).join(chosen)
    return text[0].upper() + text[1:] + "."


def define_flags() -> None:
    flags.DEFINE_integer("count", 7500, "Number of lines.", 1, 1_000_000)
    flags.DEFINE_integer("seed", 0, "Seed of all random draws.")


def main(argv: Sequence[str]) -> None:
    paths = argv[1:]
    if not paths:
        raise UserError("give text files with one sentence per line")
    lines = [line for path in paths for line in contamination.read_lines(path)]
    print("\n".join(draw(vocabulary(lines), FLAGS.count, FLAGS.seed)))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
