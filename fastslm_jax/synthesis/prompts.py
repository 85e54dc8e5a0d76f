"""A grammar of telephone prompts and short phrases.

    python -m fastslm_jax.synthesis.prompts --count=20000 --seed=0 > prompts.txt

Menus, requests for numbers, messages about accounts, orders and travel, dates, times, amounts of
money, spelled words, single words. Numbers are written in words, as they are spoken: "press seven",
"nineteen eighty four"; spelled letters are capitals with commas: "B, R, I". The grammar has many
millions of sentences.
"""

import random
import string
from collections.abc import Callable, Sequence

from absl import flags

from fastslm_jax import cli
from fastslm_jax.errors import UserError

FLAGS = flags.FLAGS

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINAL_ENDS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_MONTHS = (
    "January February March April May June July August September October November December"
).split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_NAMES = (
    "Adams Baker Carter Diaz Ellis Foster Garcia Hughes Ivanov Jensen Khan Lopez Martin Nguyen "
    "Owens "
    "Parker Quinn Rossi Singh Taylor Underwood Vargas Walker Young Zimmer"
).split()
_FIRST_NAMES = (
    "Alice Brian Carmen David Elena Frank Grace Henry Irene Jack Karen Luis Maria Noah Olivia "
    "Peter "
    "Rachel Samuel Teresa Victor Wendy Yusuf"
).split()
_CITIES = (
    "Atlanta Boston Chicago Dallas Denver Detroit Dublin Geneva Houston Lisbon London Madrid Miami "
    "Montreal Nashville Oakland Orlando Oslo Paris Phoenix Portland Prague Seattle Stockholm "
    "Sydney "
    "Toronto Vienna Warsaw"
).split()
_DEPARTMENTS = (
    "accounting|billing|the sales team|technical support|human resources|the front desk|shipping|"
    "the pharmacy|new orders|lost and found|the repair shop|reservations|the parts counter|"
    "customer care|the loan office|the emergency room|the dean's office|the help desk|the kitchen|"
    "the mail room|our clinic|the claims department|the warehouse|the manager on duty"
).split("|")
_CODES = (
    "account number|order number|zip code|date of birth|card number|employee number|pass code|"
    "security code|ticket number|policy number|phone number|member number|tracking number|"
    "room number|area code|extension|invoice number|serial number|meter reading|confirmation code|"
    "student number|case number|routing number|license plate"
).split("|")
_KEYS = ("pound|star|pound sign|star key|pound key|hash key").split("|")
_ACTIONS = (
    "hear this again|go back|leave a message|talk to a person|change your address|make a payment|"
    "check your balance|cancel the order|book a table|report a problem|renew a prescription|"
    "hear our opening hours|get directions|listen to the next message|delete it|save it|"
    "skip ahead|start over|hang up|raise the volume|change the language|add another caller|"
    "turn off the alarm|record a new greeting|forward this call|reset your password|open a claim|"
    "track a package|confirm the appointment|move to another date|update your profile|"
    "stop these reminders|hear the weather|order a new card|speak with a nurse|repeat the menu"
).split("|")
_STATES = (
    "busy|closed|open|not available|away from the desk|out of the office|on another line|"
    "being transferred|on hold|ready|full|not in service|offline|on vacation|in a meeting"
).split("|")
_THINGS = (
    "password|order|payment|package|appointment|request|reservation|prescription|message|balance|"
    "subscription|application|refund|ticket|delivery|call|recording|greeting|mailbox|line|address|"
    "invoice|contract|warranty|claim|deposit|transfer|meeting|conference|account|card|alarm"
).split("|")
_CHANGES = (
    "saved|deleted|changed|accepted|received|sent|canceled|confirmed|updated|delayed|approved|"
    "denied|completed|recorded|transferred|started|removed|locked|unlocked|paid|scheduled|shipped|"
    "renewed|closed|opened|verified|rejected|lost|found|forwarded"
).split("|")
_ITEMS = (
    "messages|calls|orders|callers ahead of you|new emails|unpaid bills|open tickets|points|"
    "free minutes|seats left|days left|rooms|packages|appointments|votes|missed calls|books|"
    "participants in the meeting|songs|photos|questions|copies"
).split("|")
_WEATHER = (
    "sunny|cloudy|rainy|windy|foggy|clear|stormy|partly cloudy|snowy|humid|hot|cold|mild|dry"
).split("|")
_WORDS = (
    "yes|no|okay|sure|maybe|never|always|again|stop|start|pause|continue|cancel|help|menu|next|"
    "previous|louder|softer|faster|slower|up|down|left|right|north|south|east|west|on|off|open|"
    "closed|today|tomorrow|yesterday|tonight|now|later|soon|hello|goodbye|thanks|please|sorry|"
    "correct|wrong|true|false|operator|representative|agent|supervisor|english|spanish|french|"
    "german|checking|savings|credit|debit|cash|morning|afternoon|evening|midnight|noon|minute|"
    "second|hour|week|month|year|dollar|cent|percent|degree|mile|kilometer|pound|ounce|gallon|"
    "plus|minus|equals|dash|slash|period|comma|star|red|green|blue|yellow|black|white|orange|"
    "purple|brown|gray|kitchen|bedroom|garage|office|light|door|window|heater|fan|camera|radio|"
    "television|hospital|airport|station|museum|library|bakery|market|bridge|harbor|castle"
).split("|")


def number(n: int) -> str:
    """A number from 0 to 999 999 in words: 1205 → "one thousand two hundred five"."""
    if n >= 1000:
        rest = f" {number(n % 1000)}" if n % 1000 else ""
        return f"{number(n // 1000)} thousand{rest}"
    if n >= 100:
        return f"{_ONES[n // 100]} hundred" + (f" {number(n % 100)}" if n % 100 else "")
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f" {_ONES[n % 10]}" if n % 10 else "")


def ordinal(n: int) -> str:
    """An ordinal number in words: 22 → "twenty second"."""
    *first, last = number(n).split()
    end = _ORDINAL_ENDS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return " ".join([*first, end])


def _digits(rng: random.Random) -> str:
    """Spoken digits of a code, in groups as of a telephone number or without."""
    zero = rng.choice(("zero", "oh"))
    digits = [rng.choice([zero, *_ONES[1:10]]) for _ in range(rng.randint(2, 10))]
    if len(digits) in (7, 10) and rng.random() < 0.7:
        for at in (3, 6)[: 1 if len(digits) == 7 else 2]:
            digits[at - 1] += ","
    return " ".join(digits)


def _count(rng: random.Random) -> str:
    return number(rng.choice((rng.randint(2, 20), rng.randint(2, 99), rng.randint(100, 999))))


def _large(rng: random.Random) -> str:
    return number(rng.choice((rng.randint(0, 9999), rng.randint(1000, 999_999))))


def _year(rng: random.Random) -> str:
    century, years = rng.choice((18, 19, 19, 20, 20)), rng.randint(0, 99)
    if years == 0:
        return f"{number(century)} hundred" if century != 20 else "two thousand"
    if century == 20 and years < 10:
        return f"two thousand {number(years)}"
    return f"{number(century)} {'oh ' if years < 10 else ''}{number(years)}"


def _date(rng: random.Random) -> str:
    month = rng.randrange(12)
    day = ordinal(rng.randint(1, 29 if month == 1 else 30 if month in (3, 5, 8, 10) else 31))
    forms = [f"{_MONTHS[month]} {day}", f"the {day} of {_MONTHS[month]}"]
    forms += [f"{rng.choice(_DAYS)}, {forms[0]}", f"{forms[0]}, {_year(rng)}"]
    return rng.choice(forms)


def _time(rng: random.Random) -> str:
    hour, minute = rng.randint(1, 12), rng.choice((0, 0, 15, 30, 45, rng.randint(1, 59)))
    half = rng.choice(("", " A M", " P M", " in the morning", " in the afternoon", " at night"))
    if minute == 0:
        return number(hour) + (half or " o'clock")
    if rng.random() < 0.2 and minute in (15, 30, 45):
        near = {15: "a quarter past", 30: "half past", 45: "a quarter to"}[minute]
        return f"{near} {number(hour)}"
    return f"{number(hour)} {'oh ' if minute < 10 else ''}{number(minute)}{half}"


def _money(rng: random.Random) -> str:
    amount, cents = rng.choice((rng.randint(1, 99), rng.randint(100, 5000))), rng.randint(1, 99)
    dollars = f"{number(amount)} dollar{'s' if amount > 1 else ''}"
    coins = f"{number(cents)} cent{'s' if cents > 1 else ''}"
    return rng.choice((dollars, f"{dollars} and {coins}", f"{dollars} and {coins}", coins))


def _letters(rng: random.Random) -> str:
    return ", ".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(1, 6)))


def _spelled(rng: random.Random) -> str:
    word = rng.choice([*_NAMES, *_CITIES, *(word for word in _WORDS if len(word) > 2)])
    return f"{word.capitalize()}, {', '.join(word.upper())}"


def _pick(choices: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(choices)


_SLOTS: dict[str, Callable[[random.Random], str]] = {
    "action": _pick(_ACTIONS),
    "change": _pick(_CHANGES),
    "city": _pick(_CITIES),
    "code": _pick(_CODES),
    "count": _count,
    "date": _date,
    "day": _pick(_DAYS),
    "department": _pick(_DEPARTMENTS),
    "digit": lambda rng: rng.choice(_ONES[:10]),
    "digits": _digits,
    "first": _pick(_FIRST_NAMES),
    "item": _pick(_ITEMS),
    "key": _pick(_KEYS),
    "large": _large,
    "letters": _letters,
    "money": _money,
    "month": _pick(_MONTHS),
    "name": _pick(_NAMES),
    "ordinal": lambda rng: ordinal(rng.randint(1, 99)),
    "small": lambda rng: number(rng.randint(2, 12)),
    "spelled": _spelled,
    "state": _pick(_STATES),
    "thing": _pick(_THINGS),
    "time": _time,
    "title": _pick(("Mister", "Missus", "Doctor", "Professor", "Captain", "Officer")),
    "weather": _pick(_WEATHER),
    "word": _pick(_WORDS),
    "year": _year,
}

# One group is drawn, then one of its sentences. A slot that occurs twice is drawn twice.
_SENTENCES = {
    "menu": (
        "press {digit} for {department}|for {department}, press {digit}|to {action}, press {digit}|"
        "press {digit} to {action}|to {action}, say {word}|if you want to {action}, press {digit}|"
        "to {action}, press {digit}; to {action}, press {digit}|press {key} to {action}|"
        "say {word} or press {digit}|you chose {digit}, to {action}|{digit} is not a choice|"
        "main menu: {department}, {digit}; {department}, {digit}|press any key to {action}|"
        "to reach {department}, stay on the line or press {digit}"
    ),
    "enter": (
        "please enter your {code}|enter the {small} digits of your {code}|"
        "type your {code}, then press {key}|please say your {code} now|your {code} is {digits}|"
        "what is your {code}?|the {code} {digits} is not in our records|"
        "that {code} does not match, please try once more|your new {code} ends in {digits}|"
        "we need the last {small} digits of the {code}|is your {code} {digits}?|"
        "did you say {digits}?|i heard {digits}, is that right?|enter your {code} or say {word}"
    ),
    "message": (
        "your {thing} was {change}|your {thing} has been {change}|"
        "the {thing} could not be {change}|"
        "your {thing} will be {change} on {date}|the {thing} from {name} was {change} at {time}|"
        "you have {count} {item}|there are {count} {item} today|{department} is {state}|"
        "{title} {name} is {state}|{first} {name} is {state}|the line to {department} is {state}|"
        "you have no {item}|message {small} was left on {date} at {time}|"
        "{first} called from {digits}|your {thing} number {large} is {state}|"
        "please wait while your {thing} is {change}|the {thing} is {state} until {time}|"
        "this {thing} was {change} by {first} {name}|do you want your {thing} {change}?"
    ),
    "call": (
        "i will connect you with {department}|please hold for {title} {name}|"
        "hello, this is {first} from {department}|thank you for calling {department}|"
        "may i ask who is calling {department}?|{title} {name} will call you back at {time}|"
        "you can reach us at {digits}|our number is {digits}, extension {digits}|"
        "call {digits} before {time}|the conference with {first} starts at {time}|"
        "{first}, are you still there?|please tell {first} to call {digits}|"
        "i am sorry, {first} is {state}|good morning, {department}, how can i help you?|"
        "the average wait for {department} is {count} minutes"
    ),
    "money": (
        "your balance is {money}|the total is {money}|{money} is due on {date}|"
        "you paid {money} on {date}|we charged {money} to the card that ends in {digits}|"
        "a fee of {money} applies after {date}|the price went from {money} to {money}|"
        "{money}|how about {money}?|do you want to pay {money} now?|"
        "a deposit of {money} was made by {first} {name}|the tip is {money}|that costs {money} each"
    ),
    "time": (
        "the time is {time}|it is {time} on {day}|we open at {time} and close at {time}|{time}|"
        "{date}|{date}, {year}|the office is closed on {date}|see you on {day} at {time}|"
        "your appointment is on {date} at {time}|is {day} at {time} good for you?|"
        "the next {thing} is on {date}|born on {date}, {year}|in the year {year}|"
        "from {time} to {time}|"
        "from {month} to {month}|every {day} in {month}|wake me at {time}|"
        "the {ordinal} {day} of the year|set an alarm for {time} on {day}"
    ),
    "travel": (
        "flight {digits} to {city} leaves at {time}|gate {digit} is {state}|"
        "the train from {city} to {city} is {count} minutes late|"
        "the bus to {city} leaves in {small} minutes|"
        "a room in {city} for {small} nights costs {money}|"
        "two tickets from {city} to {city}, please|"
        "it is {weather} in {city}, {count} degrees|"
        "tomorrow will be {weather} with a high of {count}|"
        "turn left in {small} miles|take exit {count} toward {city}|"
        "our address is {large} {name} street, {city}|the drive to {city} takes {small} hours|"
        "on {day} it was {weather} and {weather} in {city}|your seat is row {count}, {letters}"
    ),
    "numbers": (
        "{digits}|{large}|{count}|{ordinal}|{count} percent|{count} point {digits}|"
        "{digits}, {digits}|"
        "number {large}|{count} of {count}|{count} and {count}|{count} times {small}|"
        "page {count}, line {small}|channel {count}|room {large}|floor {small}|"
        "minus {count} degrees|"
        "the {ordinal} of {large}|option {small}|area code {digits}|{count} {item}"
    ),
    "letters": (
        "{letters}|the letter {letters}|{spelled}|{letters}, {digits}|{spelled}|"
        "the code is {letters}, {digits}|{name}, spelled {letters}|{letters} as in {name}|"
        "my last name is {spelled}|the city is {spelled}|license plate {letters}, {digits}|"
        "{letters} is for {first}, {letters} is for {name}"
    ),
    "words": (
        "{word}|{word}|{word}, {word}|{word} and {word}|{word}, please|no, {word}|yes, {word}|"
        "{word} or {word}?|not {word}|say {word}|{first}|{first} {name}|{title} {name}|{city}|"
        "{day}|"
        "{month}|{thing}|{thing} {change}|{state}|{department}|{code}|{code}, please|{action}"
    ),
}
_GROUPS = {name: tuple(sentences.split("|")) for name, sentences in _SENTENCES.items()}


def _written(sentence: str) -> str:
    """With a capital at the start and a mark at the end: "is it on?" → "Is it on?"."""
    sentence = sentence.replace(" i ", " I ")
    sentence = "I " + sentence[2:] if sentence.startswith("i ") else sentence
    return sentence[0].upper() + sentence[1:] + ("" if sentence[-1] in ".?!" else ".")


def draw(rng: random.Random) -> str:
    """One sentence."""
    sentence = rng.choice(_GROUPS[rng.choice(list(_GROUPS))])
    parts = string.Formatter().parse(sentence)
    return _written("".join(text + (_SLOTS[slot](rng) if slot else "") for text, slot, *_ in parts))


def prompts(count: int, seed: int = 0) -> list[str]:
    """Different sentences; a larger count continues the list of a smaller one."""
    rng, found = random.Random(f"prompts/{seed}"), {}
    while len(found) < count:
        found.setdefault(draw(rng))
    return list(found)


def define_flags() -> None:
    flags.DEFINE_integer("count", 20_000, "Number of sentences.", 1, 1_000_000)
    flags.DEFINE_integer("seed", 0, "Seed of all random draws.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value")
    print("\n".join(prompts(FLAGS.count, FLAGS.seed)))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
