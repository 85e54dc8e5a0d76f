"""Random people, things, times and places in English with Korean translations."""

import random

from fastslm_jax.demo.phrases import (
    CITIES,
    COLORED,
    COLORS,
    DAYS,
    GOODS,
    NAMES,
    NATIVE,
    ONES,
    PARTS,
    RELATIVES,
    VENUES,
    Phrase,
    josa,
)


def person(rng: random.Random, *excluded: Phrase) -> Phrase:
    """("anna", "안나") or ("my sister", "제 여동생")"""
    while True:
        drawn = rng.choice(RELATIVES) if rng.random() < 0.2 else rng.choice(NAMES)
        if drawn not in excluded:
            return drawn


def goods(rng: random.Random) -> Phrase:
    """("red shirts", "빨간 셔츠", "벌")"""
    if rng.random() < 0.6:
        return rng.choice(GOODS)
    noun = rng.choice(COLORED)
    if rng.random() < 0.3:
        return noun
    color = rng.choice(COLORS)
    return Phrase(f"{color.en} {noun.en}", f"{color.ko} {noun.ko}", noun.counter)


def counted(rng: random.Random, noun: Phrase | None = None) -> Phrase:
    """("three apples", "사과 세 개")"""
    noun = noun or goods(rng)
    n = rng.randint(2, 12)
    return Phrase(f"{ONES[n]} {noun.en}", f"{noun.ko} {NATIVE[n]} {noun.counter}")


def shopping(rng: random.Random, p_two: float = 0.5) -> Phrase:
    """One or two counted goods: ("three apples and two books", "사과 세 개와 책 두 권")"""
    first = counted(rng)
    if rng.random() > p_two:
        return first
    second = counted(rng)
    while second.en.split()[-1] == first.en.split()[-1]:
        second = counted(rng)
    return Phrase(f"{first.en} and {second.en}", f"{josa(first.ko, '과/와')} {second.ko}")


def hour(rng: random.Random, low: int = 1, high: int = 12) -> Phrase:
    """("half past three", "세 시 반")"""
    n = rng.randint(low, high)
    if rng.random() < 0.4:
        return Phrase(f"half past {ONES[n]}", f"{NATIVE[n]} 시 반")
    return Phrase(ONES[n], f"{NATIVE[n]} 시")


def clock(rng: random.Random) -> Phrase:
    """An hour, sometimes with the part of the day: ("nine in the morning", "오전 아홉 시")"""
    if rng.random() < 0.6:
        return hour(rng)
    part, ko, low, high = rng.choice(
        (("morning", "오전", 6, 11), ("afternoon", "오후", 1, 5), ("evening", "저녁", 6, 9))
    )
    drawn = hour(rng, low, high)
    return Phrase(f"{drawn.en} in the {part}", f"{ko} {drawn.ko}")


def day(rng: random.Random) -> Phrase:
    """("monday morning", "월요일 아침")"""
    weekday = rng.choice(DAYS)
    if rng.random() < 0.5:
        return weekday
    part = rng.choice(PARTS)
    return Phrase(f"{weekday.en} {part.en}", f"{weekday.ko} {part.ko}")


def when(rng: random.Random, past: bool) -> Phrase:
    """A time adverbial: ("on monday morning", "월요일 아침에")"""
    kind = rng.random()
    if kind < 0.55:
        drawn = day(rng)
        return Phrase(f"on {drawn.en}", f"{drawn.ko}에")
    weekday = rng.choice(DAYS)
    part = rng.choice(PARTS)
    if kind < 0.75:
        return (
            Phrase(f"last {weekday.en}", f"지난 {weekday.ko}에")
            if past
            else Phrase(f"next {weekday.en}", f"다음 주 {weekday.ko}에")
        )
    if kind < 0.9:
        word, ko = ("yesterday", "어제") if past else ("tomorrow", "내일")
        return (
            Phrase(f"{word} {part.en}", f"{ko} {part.ko}에")
            if rng.random() < 0.6
            else Phrase(word, ko)
        )
    return Phrase("last night", "어젯밤에") if past else Phrase("tonight", "오늘 밤에")


def place(rng: random.Random) -> Phrase:
    """("at the bank", "은행에서") or ("in london", "런던에서")"""
    if rng.random() < 0.5:
        city = rng.choice(CITIES)
        return Phrase(f"in {city.en}", f"{city.ko}에서")
    venue = rng.choice(VENUES)
    return Phrase(f"at the {venue.en}", f"{venue.ko}에서")
