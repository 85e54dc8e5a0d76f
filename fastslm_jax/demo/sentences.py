"""Random English sentences with exact Korean translations.

The entropy is in the content words (who, where, when, how many), not in the grammar, so a model
cannot transcribe a sentence without hearing it.
"""

import random
import re
from collections.abc import Callable

from fastslm_jax.demo import grammar
from fastslm_jax.demo.phrases import (
    AIR,
    CITIES,
    DOCUMENTS,
    NATIVE,
    ONES,
    SKY,
    VEHICLES,
    VENUES,
    Phrase,
    english_number,
    josa,
    sino_number,
)

MIN_WORDS, MAX_WORDS = 6, 12
MAX_SYLLABLES = 20


def count_syllables(text: str) -> int:
    """Rough syllable count (vowel groups, silent final e); only bounds the spoken duration."""
    return sum(
        max(1, len(re.findall(r"[aeiouy]+", re.sub(r"(?<=[^aeiouyl])e$", "", word))))
        for word in text.split()
    )


def _meet(rng: random.Random) -> Phrase:
    p = grammar.person(rng)
    q, place = grammar.person(rng, p), grammar.place(rng)
    past = rng.random() < 0.4
    when = grammar.when(rng, past)
    verb, ko = ("met", "만났습니다") if past else ("will meet", "만날 것입니다")
    return Phrase(
        f"{p.en} {verb} {q.en} {place.en} {when.en}",
        f"{josa(p.ko, '은/는')} {when.ko} {place.ko} {josa(q.ko, '을/를')} {ko}",
    )


def _buy(rng: random.Random) -> Phrase:
    p, things, place = grammar.person(rng), grammar.shopping(rng), grammar.place(rng)
    past = rng.random() < 0.6
    verb, ko = ("bought", "샀습니다") if past else ("will buy", "살 것입니다")
    if rng.random() < 0.5:
        place = grammar.when(rng, past)
    return Phrase(
        f"{p.en} {verb} {things.en} {place.en}",
        f"{josa(p.ko, '은/는')} {place.ko} {josa(things.ko, '을/를')} {ko}",
    )


def _order(rng: random.Random) -> Phrase:
    things, when = grammar.shopping(rng, 0.7), grammar.when(rng, past=False)
    tail, ko = (
        (f" for {when.en.removeprefix('on ')}", f"{when.ko} 쓸 ")
        if rng.random() < 0.3
        else ("", "")
    )
    return Phrase(
        f"i would like {things.en}{tail} please", f"{ko}{josa(things.ko, '을/를')} 주세요"
    )


def _send(rng: random.Random) -> Phrase:
    thing, q = rng.choice(DOCUMENTS), grammar.person(rng)
    deadline = grammar.day(rng) if rng.random() < 0.5 else grammar.clock(rng)
    if rng.random() < 0.5:
        return Phrase(
            f"please send the {thing.en} to {q.en} before {deadline.en}",
            f"{deadline.ko} 전에 {q.ko}에게 {josa(thing.ko, '을/를')} 보내 주세요",
        )
    p, when = grammar.person(rng, q), grammar.when(rng, past=True)
    return Phrase(
        f"{p.en} sent the {thing.en} to {q.en} {when.en}",
        f"{josa(p.ko, '은/는')} {when.ko} {q.ko}에게 {josa(thing.ko, '을/를')} 보냈습니다",
    )


def _book(rng: random.Random) -> Phrase:
    what = rng.choice((Phrase("table", "자리"), Phrase("room", "방"), Phrase("taxi", "택시")))
    n, hour, when = rng.randint(2, 12), grammar.hour(rng), grammar.when(rng, past=False)
    time = (
        Phrase(f"{when.en} at {hour.en}", f"{when.ko.removesuffix('에')} {hour.ko}에")
        if rng.random() < 0.6
        else when
    )
    return Phrase(
        f"please book a {what.en} for {ONES[n]} people {time.en}",
        f"{time.ko} {NATIVE[n]} 명이 쓸 {josa(what.ko, '을/를')} 예약해 주세요",
    )


def _visit(rng: random.Random) -> Phrase:
    p, venue, city = grammar.person(rng), rng.choice(VENUES), rng.choice(CITIES)
    past = rng.random() < 0.5
    when = grammar.when(rng, past)
    verb, ko = ("visited", "방문했습니다") if past else ("will visit", "방문할 것입니다")
    return Phrase(
        f"{p.en} {verb} the {venue.en} in {city.en} {when.en}",
        f"{josa(p.ko, '은/는')} {when.ko} {city.ko}에 있는 {josa(venue.ko, '을/를')} {ko}",
    )


def _weather(rng: random.Random) -> Phrase:
    air, and_ = rng.choice(AIR)
    sky, future, was = rng.choice([s for s in SKY if s[0] != "snowy" or air not in ("warm", "hot")])
    city, past = rng.choice(CITIES), rng.random() < 0.4
    when = grammar.when(rng, past)
    if rng.random() < 0.4:
        n = rng.randint(11, 39)
        verb, ko = ("was", "도였습니다") if past else ("will be", "도일 것입니다")
        return Phrase(
            f"it {verb} {english_number(n)} degrees in {city.en} {when.en}",
            f"{when.ko} {josa(city.ko, '은/는')} {sino_number(n)} {ko}",
        )
    verb, ko = ("was", was) if past else ("will be", f"{future} 것입니다")
    return Phrase(
        f"it {verb} {air} and {sky} in {city.en} {when.en}",
        f"{when.ko} {josa(city.ko, '은/는')} {and_} {ko}",
    )


def _travel(rng: random.Random) -> Phrase:
    vehicle, (here, there) = rng.choice(VEHICLES), rng.sample(CITIES, 2)
    time = grammar.hour(rng)
    if vehicle.en == "train" and rng.random() < 0.7:
        n = rng.randint(1, 19)
        return Phrase(
            f"the train to {there.en} leaves from platform {ONES[n]} at {time.en}",
            f"{there.ko}행 기차는 {time.ko}에 {sino_number(n)} 번 승강장에서 출발합니다",
        )
    verb, ko = rng.choice((("leaves", "출발합니다"), ("arrives", "도착합니다")))
    return Phrase(
        f"the {vehicle.en} from {here.en} to {there.en} {verb} at {time.en}",
        f"{here.ko}에서 {josa(there.ko, '으로/로')} 가는 "
        f"{josa(vehicle.ko, '은/는')} {time.ko}에 {ko}",
    )


def _call(rng: random.Random) -> Phrase:
    q, about = grammar.person(rng), rng.choice(DOCUMENTS)
    when = grammar.when(rng, past=False)
    if rng.random() < 0.5:
        clock = grammar.clock(rng)
        when = Phrase(f"at {clock.en}", f"{clock.ko}에")
    return Phrase(
        f"please call {q.en} about the {about.en} {when.en}",
        f"{when.ko} {q.ko}에게 {about.ko}에 대해 전화해 주세요",
    )


def _pay(rng: random.Random) -> Phrase:
    p, things, n = grammar.person(rng), grammar.counted(rng), rng.randint(13, 99)
    place = grammar.place(rng) if rng.random() < 0.6 else Phrase("", "")
    price = f"{sino_number(n)} 달러를 냈습니다"
    return Phrase(
        f"{p.en} paid {english_number(n)} dollars for {things.en} {place.en}".strip(),
        " ".join(f"{josa(p.ko, '은/는')} {place.ko} {things.ko}에 {price}".split()),
    )


def _work(rng: random.Random) -> Phrase:
    p, venue, start, end = (
        grammar.person(rng),
        rng.choice(VENUES),
        grammar.hour(rng, 6, 11),
        grammar.hour(rng, 1, 5),
    )
    verb, ko = rng.choice(
        (("works", "일합니다"), ("reads", "책을 읽습니다"), ("waits", "기다립니다"))
    )
    return Phrase(
        f"{p.en} {verb} at the {venue.en} from {start.en} to {end.en}",
        f"{josa(p.ko, '은/는')} {start.ko}부터 {end.ko}까지 {venue.ko}에서 {ko}",
    )


TEMPLATES: tuple[Callable[[random.Random], Phrase], ...] = (
    _meet,
    _buy,
    _order,
    _send,
    _book,
    _visit,
    _weather,
    _travel,
    _call,
    _pay,
    _work,
)


def sentence(rng: random.Random) -> Phrase:
    """A sentence of 6 to 12 words with its Korean translation, from any split."""
    while True:
        drawn = rng.choice(TEMPLATES)(rng)
        if (
            MIN_WORDS <= len(drawn.en.split()) <= MAX_WORDS
            and count_syllables(drawn.en) <= MAX_SYLLABLES
        ):
            return drawn
