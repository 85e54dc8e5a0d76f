"""Sentences with a free license, for the training of an open vocabulary.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb unpacked
    python -m fastslm_jax.synthesis.texts --wordnet=unpacked/usr/share/wordnet > wordnet.txt

WordNet 3.0's examples of usage (the quotations in data.noun, data.verb, data.adj and data.adv), or
with --part=definitions its definitions, such as "an entity that has physical existence". WordNet's
license allows use for any purpose if its notice is kept.
"""

import pathlib
import re
from collections.abc import Iterator, Sequence

from absl import flags

from fastslm_jax import cli
from fastslm_jax.errors import UserError

PARTS = ("data.noun", "data.verb", "data.adj", "data.adv")
WORDS = (2, 25)  # of a sentence
_MAX_LETTERS = 16  # of a word
_ALLOWED = re.compile(r"[A-Za-z ,.;:!?'\"()\-]+")
_ACRONYM = re.compile(r"\b[A-Z]{3,}\b")  # engines do not agree on how to read them
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "-"})

FLAGS = flags.FLAGS


def clean(text: str) -> str | None:
    """A text as a sentence to speak; None if it is not one.

    Example: "the  cat sat ;" → "the cat sat;".
    """
    text = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.translate(_QUOTES).split())).strip('" ')
    found = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text)
    is_sentence = WORDS[0] <= len(found) <= WORDS[1] and max(map(len, found)) <= _MAX_LETTERS
    return text if is_sentence and _ALLOWED.fullmatch(text) and not _ACRONYM.search(text) else None


def examples(gloss: str) -> list[str]:
    """'a team; "the team is a unit"' → ["the team is a unit"]."""
    return re.findall(r'"([^"]{6,})"', gloss)


def definitions(gloss: str) -> list[str]:
    """'(of time) a month; a part of a year; "last month"' → ["a month", "a part of a year"]."""
    parts = re.sub(r'\([^)]*\)|"[^"]*"?', "", gloss).split(";")
    return [part for part in parts if not part.strip().startswith("-")]  # the author of an example


GLOSS_PARTS = {"examples": examples, "definitions": definitions}


def wordnet(folder: pathlib.Path, part: str = "examples") -> Iterator[str]:
    """The sentences of WordNet's data files, each once, in the order of the files.

    Args:
        part: of the glosses, in GLOSS_PARTS.

    Raises:
        UserError: the folder has no such file.
    """
    seen = set()
    for name in PARTS:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the folder of WordNet's {PARTS[0]}")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            # "00001740 03 n 01 entity 0 … | a definition; "an example""; the license is indented.
            gloss = "" if line.startswith(" ") else line.partition("|")[2]
            for text in GLOSS_PARTS[part](gloss):
                sentence = clean(text)
                if sentence and sentence.lower() not in seen:
                    seen.add(sentence.lower())
                    yield sentence


def define_flags() -> None:
    flags.DEFINE_string("wordnet", None, "Folder of WordNet's data files.", required=True)
    flags.DEFINE_enum("part", "examples", [*GLOSS_PARTS], "What of each entry.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: give --wordnet=DIR")
    for sentence in wordnet(pathlib.Path(FLAGS.wordnet), FLAGS.part):
        print(sentence)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
