"""A small compositional English: sentences with exact Korean parallels, lists of notes, and questions with exact answers.

Everything is a pure function of a `random.Random`, and the split of an example is a hash of its spoken words, so the train, dev
and test sentences are disjoint for every seed. Content words (who, where, when, how many) carry the entropy, not the grammar: a
model cannot transcribe them without hearing them.

    >>> example("ast", random.Random(3), "train").answer      # "please send the recipe to my cousin before friday"
    '금요일 전에 제 사촌에게 요리법을 보내 주세요'
"""

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo.phrases import (
    AIR,
    CITIES,
    COLORED,
    COLORS,
    DAYS,
    DOCUMENTS,
    GOODS,
    NAMES,
    NATIVE,
    ONES,
    PARTS,
    RELATIVES,
    SKY,
    VEHICLES,
    VENUES,
    Phrase,
    english_number,
    josa,
    sino_number,
)

SPLITS = ("train", "dev", "test")
MIN_WORDS, MAX_WORDS = 6, 12
# A spoken upper bound per task: syllables at the slowest speaking rate stay below `synthetic.MAX_SECONDS`; long questions are
# spoken faster.
MAX_SYLLABLES = {"asr": 20, "ast": 20, "ssum": 44, "sqqa": 29}


@dataclasses.dataclass(frozen=True)
class SpokenExample:
    """`text` is exactly what is spoken; `answer` is the target; `lang` is the language of the answer."""

    task: str
    text: str
    prompt: str
    answer: str
    lang: str = "en"


def split_of(text: str) -> str:
    """The split that a spoken text belongs to, by its hash: 80 % train, 10 % dev, 10 % test."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 80 else "dev" if bucket < 90 else "test"


def syllables(text: str) -> int:
    """A rough count (vowel groups, silent final e), enough to bound a spoken duration."""
    return sum(
        max(1, len(re.findall(r"[aeiouy]+", re.sub(r"(?<=[^aeiouyl])e$", "", word))))
        for word in text.split()
    )


# Pieces: each draws a phrase.


def _person(rng: random.Random, *not_these: Phrase) -> Phrase:
    while True:
        person = rng.choice(RELATIVES) if rng.random() < 0.2 else rng.choice(NAMES)
        if person not in not_these:
            return person


def _goods(rng: random.Random) -> Phrase:
    """("red shirts", "빨간 셔츠", "벌")"""
    if rng.random() < 0.6:
        return rng.choice(GOODS)
    noun = rng.choice(COLORED)
    if rng.random() < 0.3:
        return noun
    color = rng.choice(COLORS)
    return Phrase(f"{color.en} {noun.en}", f"{color.ko} {noun.ko}", noun.counter)


def _counted(rng: random.Random, noun: Phrase | None = None) -> Phrase:
    """("three apples", "사과 세 개")"""
    noun = noun or _goods(rng)
    n = rng.randint(2, 12)
    return Phrase(f"{ONES[n]} {noun.en}", f"{noun.ko} {NATIVE[n]} {noun.counter}")


def _shopping(rng: random.Random, p_two: float = 0.5) -> Phrase:
    """One or two counted goods: ("three apples and two books", "사과 세 개와 책 두 권")"""
    first = _counted(rng)
    if rng.random() > p_two:
        return first
    second = _counted(rng)
    while second.en.split()[-1] == first.en.split()[-1]:
        second = _counted(rng)
    return Phrase(f"{first.en} and {second.en}", f"{josa(first.ko, '과/와')} {second.ko}")


def _hour(rng: random.Random, low: int = 1, high: int = 12) -> Phrase:
    """("half past three", "세 시 반")"""
    n = rng.randint(low, high)
    if rng.random() < 0.4:
        return Phrase(f"half past {ONES[n]}", f"{NATIVE[n]} 시 반")
    return Phrase(ONES[n], f"{NATIVE[n]} 시")


def _clock(rng: random.Random) -> Phrase:
    """An hour, at times with its part of the day: ("nine in the morning", "오전 아홉 시")"""
    if rng.random() < 0.6:
        return _hour(rng)
    part, ko, low, high = rng.choice(
        (("morning", "오전", 6, 11), ("afternoon", "오후", 1, 5), ("evening", "저녁", 6, 9))
    )
    hour = _hour(rng, low, high)
    return Phrase(f"{hour.en} in the {part}", f"{ko} {hour.ko}")


def _day(rng: random.Random) -> Phrase:
    """("monday morning", "월요일 아침")"""
    day = rng.choice(DAYS)
    if rng.random() < 0.5:
        return day
    part = rng.choice(PARTS)
    return Phrase(f"{day.en} {part.en}", f"{day.ko} {part.ko}")


def _when(rng: random.Random, past: bool) -> Phrase:
    """An adverbial of time with its particle: ("on monday morning", "월요일 아침에")"""
    kind = rng.random()
    if kind < 0.55:
        day = _day(rng)
        return Phrase(f"on {day.en}", f"{day.ko}에")
    day = rng.choice(DAYS)
    part = rng.choice(PARTS)
    if kind < 0.75:
        return (
            Phrase(f"last {day.en}", f"지난 {day.ko}에")
            if past
            else Phrase(f"next {day.en}", f"다음 주 {day.ko}에")
        )
    if kind < 0.9:
        word, ko = ("yesterday", "어제") if past else ("tomorrow", "내일")
        return (
            Phrase(f"{word} {part.en}", f"{ko} {part.ko}에")
            if rng.random() < 0.6
            else Phrase(word, ko)
        )
    return Phrase("last night", "어젯밤에") if past else Phrase("tonight", "오늘 밤에")


def _place(rng: random.Random) -> Phrase:
    """("at the bank", "은행에서") or ("in london", "런던에서")"""
    if rng.random() < 0.5:
        city = rng.choice(CITIES)
        return Phrase(f"in {city.en}", f"{city.ko}에서")
    venue = rng.choice(VENUES)
    return Phrase(f"at the {venue.en}", f"{venue.ko}에서")


# Sentence templates: each draws a whole sentence.


def _meet(rng: random.Random) -> Phrase:
    p = _person(rng)
    q, place = _person(rng, p), _place(rng)
    past = rng.random() < 0.4
    when = _when(rng, past)
    verb, ko = ("met", "만났습니다") if past else ("will meet", "만날 것입니다")
    return Phrase(
        f"{p.en} {verb} {q.en} {place.en} {when.en}",
        f"{josa(p.ko, '은/는')} {when.ko} {place.ko} {josa(q.ko, '을/를')} {ko}",
    )


def _buy(rng: random.Random) -> Phrase:
    p, things, place = _person(rng), _shopping(rng), _place(rng)
    past = rng.random() < 0.6
    verb, ko = ("bought", "샀습니다") if past else ("will buy", "살 것입니다")
    if rng.random() < 0.5:
        place = _when(rng, past)
    return Phrase(
        f"{p.en} {verb} {things.en} {place.en}",
        f"{josa(p.ko, '은/는')} {place.ko} {josa(things.ko, '을/를')} {ko}",
    )


def _order(rng: random.Random) -> Phrase:
    things, when = _shopping(rng, 0.7), _when(rng, past=False)
    tail, ko = (
        (f" for {when.en.removeprefix('on ')}", f"{when.ko} 쓸 ")
        if rng.random() < 0.3
        else ("", "")
    )
    return Phrase(
        f"i would like {things.en}{tail} please", f"{ko}{josa(things.ko, '을/를')} 주세요"
    )


def _send(rng: random.Random) -> Phrase:
    thing, q = rng.choice(DOCUMENTS), _person(rng)
    deadline = _day(rng) if rng.random() < 0.5 else _clock(rng)
    if rng.random() < 0.5:
        return Phrase(
            f"please send the {thing.en} to {q.en} before {deadline.en}",
            f"{deadline.ko} 전에 {q.ko}에게 {josa(thing.ko, '을/를')} 보내 주세요",
        )
    p, when = _person(rng, q), _when(rng, past=True)
    return Phrase(
        f"{p.en} sent the {thing.en} to {q.en} {when.en}",
        f"{josa(p.ko, '은/는')} {when.ko} {q.ko}에게 {josa(thing.ko, '을/를')} 보냈습니다",
    )


def _book(rng: random.Random) -> Phrase:
    what = rng.choice((Phrase("table", "자리"), Phrase("room", "방"), Phrase("taxi", "택시")))
    n, hour, when = rng.randint(2, 12), _hour(rng), _when(rng, past=False)
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
    p, venue, city = _person(rng), rng.choice(VENUES), rng.choice(CITIES)
    past = rng.random() < 0.5
    when = _when(rng, past)
    verb, ko = ("visited", "방문했습니다") if past else ("will visit", "방문할 것입니다")
    return Phrase(
        f"{p.en} {verb} the {venue.en} in {city.en} {when.en}",
        f"{josa(p.ko, '은/는')} {when.ko} {city.ko}에 있는 {josa(venue.ko, '을/를')} {ko}",
    )


def _weather(rng: random.Random) -> Phrase:
    air, and_ = rng.choice(AIR)
    sky, future, was = rng.choice([s for s in SKY if s[0] != "snowy" or air not in ("warm", "hot")])
    city, past = rng.choice(CITIES), rng.random() < 0.4
    when = _when(rng, past)
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
    time = _hour(rng)
    if vehicle.en == "train" and rng.random() < 0.7:
        n = rng.randint(1, 19)
        return Phrase(
            f"the train to {there.en} leaves from platform {ONES[n]} at {time.en}",
            f"{there.ko}행 기차는 {time.ko}에 {sino_number(n)} 번 승강장에서 출발합니다",
        )
    verb, ko = rng.choice((("leaves", "출발합니다"), ("arrives", "도착합니다")))
    return Phrase(
        f"the {vehicle.en} from {here.en} to {there.en} {verb} at {time.en}",
        f"{here.ko}에서 {josa(there.ko, '으로/로')} 가는 {josa(vehicle.ko, '은/는')} {time.ko}에 {ko}",
    )


def _call(rng: random.Random) -> Phrase:
    q, about = _person(rng), rng.choice(DOCUMENTS)
    when = _when(rng, past=False)
    if rng.random() < 0.5:
        clock = _clock(rng)
        when = Phrase(f"at {clock.en}", f"{clock.ko}에")
    return Phrase(
        f"please call {q.en} about the {about.en} {when.en}",
        f"{when.ko} {q.ko}에게 {about.ko}에 대해 전화해 주세요",
    )


def _pay(rng: random.Random) -> Phrase:
    p, things, n = _person(rng), _counted(rng), rng.randint(13, 99)
    place = _place(rng) if rng.random() < 0.6 else Phrase("", "")
    return Phrase(
        f"{p.en} paid {english_number(n)} dollars for {things.en} {place.en}".strip(),
        " ".join(
            f"{josa(p.ko, '은/는')} {place.ko} {things.ko}에 {sino_number(n)} 달러를 냈습니다".split()
        ),
    )


def _work(rng: random.Random) -> Phrase:
    p, venue, start, end = _person(rng), rng.choice(VENUES), _hour(rng, 6, 11), _hour(rng, 1, 5)
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
    """A sentence of 6 to 12 words with its Korean parallel, of any split."""
    while True:
        drawn = rng.choice(TEMPLATES)(rng)
        if (
            MIN_WORDS <= len(drawn.en.split()) <= MAX_WORDS
            and syllables(drawn.en) <= MAX_SYLLABLES["asr"]
        ):
            return drawn


# Notes (ssum): a spoken list, and one line that counts and names.


def _note(rng: random.Random) -> tuple[str, str]:
    """("send the report to david", "send report")"""
    person, venue = rng.choice(NAMES).en, rng.choice(VENUES).en
    kind = rng.randrange(6)
    if kind == 0:
        return f"call {person} at {_hour(rng).en}", f"call {person}"
    if kind == 1:
        noun = rng.choice(GOODS + COLORED)
        return f"buy {_counted(rng, noun).en}", f"buy {noun.en}"
    if kind == 2:
        document = rng.choice(DOCUMENTS).en
        return f"send the {document} to {person}", f"send {document}"
    if kind == 3:
        return f"meet {person} at the {venue}", f"meet {person}"
    if kind == 4:
        what = rng.choice(("table", "room", "taxi"))
        return f"book a {what} for {ONES[rng.randint(2, 12)]} people", f"book {what}"
    return f"visit the {venue} on {rng.choice(DAYS).en}", f"visit {venue}"


def _notes(rng: random.Random) -> tuple[str, str]:
    count = rng.randint(2, 4)
    notes: dict[str, str] = {}  # summary -> note, so that no two notes have the same summary
    while len(notes) < count:
        spoken, summary = _note(rng)
        notes[summary] = spoken
    text = " ".join(f"note {ONES[i]} {spoken}" for i, spoken in enumerate(notes.values(), 1))
    return text, f"{ONES[count]} notes {' '.join(notes)}"


# Questions (sqqa): one or two facts, then a question about one of them, each with one exact answer.


# A fact: what it names (two facts that share a name could make a question ambiguous), the statement, and its (question, answer)s.
Fact = tuple[set[str], str, tuple[tuple[str, str], ...]]


def _bought(rng: random.Random) -> Fact:
    p, things, city = rng.choice(NAMES).en, rng.choice(GOODS + COLORED).en, rng.choice(CITIES).en
    n = ONES[rng.randint(2, 12)]
    asked = (
        (f"how many {things} did {p} buy", n),
        (f"who bought {things}", p),
        (f"where did {p} buy {things}", city),
        (f"what did {p} buy", f"{n} {things}"),
    )
    return {p, things, city, n}, f"{p} bought {n} {things} in {city}", asked


def _meets(rng: random.Random) -> Fact:
    p, q = (person.en for person in rng.sample(NAMES, 2))
    venue, day = rng.choice(VENUES).en, rng.choice(DAYS).en
    asked = (
        (f"who will {p} meet", q),
        (f"where will {p} meet {q}", f"the {venue}"),
        (f"when will {p} meet {q}", day),
    )
    return {p, q, venue, day}, f"{p} will meet {q} at the {venue} on {day}", asked


def _visited(rng: random.Random) -> Fact:
    p, city, day = rng.choice(NAMES).en, rng.choice(CITIES).en, rng.choice(DAYS).en
    asked = (
        (f"when did {p} visit {city}", day),
        (f"where was {p} on {day}", city),
        (f"who visited {city} on {day}", p),
    )
    return {p, city, day}, f"{p} visited {city} on {day}", asked


def _sent(rng: random.Random) -> Fact:
    p, q = (person.en for person in rng.sample(NAMES, 2))
    thing, day = rng.choice(DOCUMENTS).en, rng.choice(DAYS).en
    asked = (
        (f"who got the {thing}", q),
        (f"who sent the {thing}", p),
        (f"what did {p} send to {q}", f"the {thing}"),
        (f"when did {p} send the {thing}", day),
    )
    return {p, q, thing, day}, f"{p} sent the {thing} to {q} on {day}", asked


def _leaves(rng: random.Random) -> Fact:
    vehicle, city, time = rng.choice(VEHICLES).en, rng.choice(CITIES).en, _hour(rng).en
    asked = (
        (f"when does the {vehicle} to {city} leave", time),
        (f"where does the {vehicle} at {time} go", city),
    )
    return {vehicle, city, time}, f"the {vehicle} to {city} leaves at {time}", asked


def _will_be(rng: random.Random) -> Fact:
    sky, city, day = rng.choice(SKY)[0], rng.choice(CITIES).en, rng.choice(DAYS).en
    asked = (
        (f"where will it be {sky}", city),
        (f"how will the weather be in {city}", sky),
        (f"when will it be {sky} in {city}", day),
    )
    return {sky, city, day}, f"it will be {sky} in {city} on {day}", asked


FACTS: tuple[Callable[[random.Random], Fact], ...] = (
    _bought,
    _bought,
    _meets,
    _visited,
    _sent,
    _leaves,
    _will_be,
)
# Of a second fact of another kind; many of those are too long to keep. Training has more of what is harder: about half, and a
# quarter elsewhere.
P_DISTRACTOR, P_DISTRACTOR_TRAIN = 0.4, 0.65


def _question(rng: random.Random, p_distractor: float = P_DISTRACTOR) -> tuple[str, str]:
    """One fact, or two of different kinds, and a question about one of them."""
    draw = rng.choice(FACTS)
    names, statement, asked = draw(rng)
    question, answer = rng.choice(asked)
    if rng.random() < p_distractor:
        other, others, distractor = draw, names, ""
        while other is draw or others & names:
            other = rng.choice(FACTS)
            others, distractor, _ = other(rng)
        statement = " and ".join(rng.sample((statement, distractor), 2))
    return f"{statement} {question}", answer


def example(task: str, rng: random.Random, split: str | None = None) -> SpokenExample:
    """Draws an example of a task; with `split`, one whose spoken words hash to that split."""
    while True:
        if task in ("asr", "ast"):
            drawn = sentence(rng)
            text, answer = drawn.en, drawn.en if task == "asr" else drawn.ko
        elif task == "ssum":
            text, answer = _notes(rng)
        elif task == "sqqa":
            text, answer = _question(rng, P_DISTRACTOR_TRAIN if split == "train" else P_DISTRACTOR)
        else:
            raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
        if syllables(text) <= MAX_SYLLABLES[task] and split in (None, split_of(text)):
            return SpokenExample(
                task, text, TASKS[task].instruction, answer, "ko" if task == "ast" else "en"
            )


def text_examples(
    split: str, seed: int, count: int, tasks: Sequence[str] = tuple(TASKS)
) -> Iterator[SpokenExample]:
    """Text-only examples of a split, tasks in turn: language-model and tokenizer training without audio."""
    rng = random.Random(f"text/{seed}/{split}")
    for i in range(count):
        yield example(tasks[i % len(tasks)], rng, split)


@functools.cache
def lexicon(tasks: tuple[str, ...] = tuple(TASKS)) -> tuple[str, ...]:
    """All distinct English words of the tasks, sorted: the templates, sampled far beyond the rarest word."""
    rng = random.Random("lexicon")
    return tuple(
        sorted(
            {
                word
                for task in tasks
                for _ in range(6000)
                for word in example(task, rng).text.split()
            }
        )
    )
