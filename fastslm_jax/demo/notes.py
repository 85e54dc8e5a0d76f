"""Spoken lists of notes with one-line summaries (the speech summarization task)."""

import random

from fastslm_jax.demo import grammar
from fastslm_jax.demo.phrases import (
    COLORED,
    DAYS,
    DOCUMENTS,
    GOODS,
    NAMES,
    ONES,
    VENUES,
)


def _note(rng: random.Random) -> tuple[str, str]:
    """(spoken note, its summary): ("send the report to david", "send report")"""
    person, venue = rng.choice(NAMES).en, rng.choice(VENUES).en
    kind = rng.randrange(6)
    if kind == 0:
        return f"call {person} at {grammar.hour(rng).en}", f"call {person}"
    if kind == 1:
        noun = rng.choice(GOODS + COLORED)
        return f"buy {grammar.counted(rng, noun).en}", f"buy {noun.en}"
    if kind == 2:
        document = rng.choice(DOCUMENTS).en
        return f"send the {document} to {person}", f"send {document}"
    if kind == 3:
        return f"meet {person} at the {venue}", f"meet {person}"
    if kind == 4:
        what = rng.choice(("table", "room", "taxi"))
        return f"book a {what} for {ONES[rng.randint(2, 12)]} people", f"book {what}"
    return f"visit the {venue} on {rng.choice(DAYS).en}", f"visit {venue}"


def notes_and_summary(rng: random.Random) -> tuple[str, str]:
    """Two to four numbered notes, and a summary that counts and names them.

    Example: ("note one call anna at two note two meet martin at the beach",
    "two notes call anna meet martin").
    """
    count = rng.randint(2, 4)
    notes: dict[str, str] = {}  # summary -> spoken note: keeps the summaries distinct
    while len(notes) < count:
        spoken, summary = _note(rng)
        notes[summary] = spoken
    text = " ".join(f"note {ONES[i]} {spoken}" for i, spoken in enumerate(notes.values(), 1))
    return text, f"{ONES[count]} notes {' '.join(notes)}"
