"""Sentences to speak, from text files with one sentence per line."""

import collections
import os
import unicodedata
from collections.abc import Iterable, Sequence

from fastslm_jax.data.contamination import KnownTexts, read_lines, words
from fastslm_jax.errors import UserError

MAX_CHARACTERS = 400


def select(
    lines: Iterable[str], excluded: Iterable[str] = ()
) -> tuple[list[str], collections.Counter[str]]:
    """Selects the lines that can be spoken, and that have nothing in common with other texts.

    Args:
        lines: sentences.
        excluded: texts of which no sentence may be equal to one, or share four words in a row with
            one. Case and punctuation do not matter.

    Returns:
        The sentences in order, and the number of lines that were dropped by reason.
    """
    known, kept, dropped = KnownTexts(excluded), {}, collections.Counter()
    for line in lines:
        if reason := _fault(line, kept, known):
            dropped[reason] += 1
        else:
            kept[line] = None
    return list(kept), dropped


def _fault(line: str, kept: dict[str, None], known: KnownTexts) -> str:
    if not words(line):
        return "no words"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in line):
        return "control characters"
    if len(line) > MAX_CHARACTERS:
        return f"more than {MAX_CHARACTERS} characters"
    if line in kept:
        return "duplicates"
    if known.has(line):
        return "equal to an excluded text"
    return f"{known.n} words of an excluded text" if known.shared(line) else ""


def read(
    paths: Sequence[str | os.PathLike], excluded: Iterable[str] = ()
) -> tuple[list[str], collections.Counter[str]]:
    """Reads text files; see `select`.

    Raises:
        UserError: a file is missing or empty, or no sentence is left.
    """
    lines = [line for path in paths for line in read_lines(path)]
    kept, dropped = select(lines, excluded)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise UserError(f"{', '.join(map(str, paths))}: no sentence is left ({reasons})")
    return kept, dropped
