"""Spoken questions with exact answers (the spoken question answering task)."""

import random
from collections.abc import Callable
from typing import NamedTuple

from fastslm_jax.demo import grammar
from fastslm_jax.demo.phrases import (
    CITIES,
    COLORED,
    DAYS,
    DOCUMENTS,
    GOODS,
    NAMES,
    ONES,
    SKY,
    VEHICLES,
    VENUES,
)


class Fact(NamedTuple):
    """A statement with its (question, answer) pairs.

    `names` are the words it mentions: two facts that share one could make a question ambiguous.
    """

    names: set[str]
    statement: str
    questions: tuple[tuple[str, str], ...]


def _bought(rng: random.Random) -> Fact:
    p, things, city = rng.choice(NAMES).en, rng.choice(GOODS + COLORED).en, rng.choice(CITIES).en
    n = ONES[rng.randint(2, 12)]
    questions = (
        (f"how many {things} did {p} buy", n),
        (f"who bought {things}", p),
        (f"where did {p} buy {things}", city),
        (f"what did {p} buy", f"{n} {things}"),
    )
    return Fact({p, things, city, n}, f"{p} bought {n} {things} in {city}", questions)


def _meets(rng: random.Random) -> Fact:
    p, q = (person.en for person in rng.sample(NAMES, 2))
    venue, day = rng.choice(VENUES).en, rng.choice(DAYS).en
    questions = (
        (f"who will {p} meet", q),
        (f"where will {p} meet {q}", f"the {venue}"),
        (f"when will {p} meet {q}", day),
    )
    return Fact({p, q, venue, day}, f"{p} will meet {q} at the {venue} on {day}", questions)


def _visited(rng: random.Random) -> Fact:
    p, city, day = rng.choice(NAMES).en, rng.choice(CITIES).en, rng.choice(DAYS).en
    questions = (
        (f"when did {p} visit {city}", day),
        (f"where was {p} on {day}", city),
        (f"who visited {city} on {day}", p),
    )
    return Fact({p, city, day}, f"{p} visited {city} on {day}", questions)


def _sent(rng: random.Random) -> Fact:
    p, q = (person.en for person in rng.sample(NAMES, 2))
    thing, day = rng.choice(DOCUMENTS).en, rng.choice(DAYS).en
    questions = (
        (f"who got the {thing}", q),
        (f"who sent the {thing}", p),
        (f"what did {p} send to {q}", f"the {thing}"),
        (f"when did {p} send the {thing}", day),
    )
    return Fact({p, q, thing, day}, f"{p} sent the {thing} to {q} on {day}", questions)


def _leaves(rng: random.Random) -> Fact:
    vehicle, city, time = rng.choice(VEHICLES).en, rng.choice(CITIES).en, grammar.hour(rng).en
    questions = (
        (f"when does the {vehicle} to {city} leave", time),
        (f"where does the {vehicle} at {time} go", city),
    )
    return Fact({vehicle, city, time}, f"the {vehicle} to {city} leaves at {time}", questions)


def _will_be(rng: random.Random) -> Fact:
    sky, city, day = rng.choice(SKY)[0], rng.choice(CITIES).en, rng.choice(DAYS).en
    questions = (
        (f"where will it be {sky}", city),
        (f"how will the weather be in {city}", sky),
        (f"when will it be {sky} in {city}", day),
    )
    return Fact({sky, city, day}, f"it will be {sky} in {city} on {day}", questions)


FACTS: tuple[Callable[[random.Random], Fact], ...] = (
    _bought,
    _bought,
    _meets,
    _visited,
    _sent,
    _leaves,
    _will_be,
)
# Probability of drawing a second, distracting fact. Many pairs are too long and are rejected, which
# leaves about half of the questions in training and a quarter elsewhere.
P_DISTRACTOR_TRAIN, P_DISTRACTOR = 0.65, 0.4


def facts_and_question(rng: random.Random, p_distractor: float = P_DISTRACTOR) -> tuple[str, str]:
    """(spoken text, answer): one or two facts of different kinds, then a question about one."""
    draw = rng.choice(FACTS)
    fact = draw(rng)
    statement = fact.statement
    question, answer = rng.choice(fact.questions)
    if rng.random() < p_distractor:
        while True:
            draw_other = rng.choice(FACTS)
            distractor = draw_other(rng)
            if draw_other is not draw and not distractor.names & fact.names:
                break
        statement = " and ".join(rng.sample((statement, distractor.statement), 2))
    return f"{statement} {question}", answer
