"""Types of the fields that manifests, imported folders and predictions have in common."""

import math
import re
from typing import Annotated, Literal

import pydantic

from fastslm_jax import schema
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import languages
from fastslm_jax.data.tasks import TASKS

MAX_SECONDS = 366 * 24 * 3600.0  # a year
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # without tab and line breaks


def _without_control_characters(text: str) -> str:
    if found := _CONTROL.search(text):
        raise ValueError(f"should not contain the control character U+{ord(found.group()):04X}")
    return text


def number_as_text(value: object) -> object:
    """A finite number as text; other values unchanged."""
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    return str(value) if is_number else value


def phrases_as_text(value: object) -> object:
    """Context as one text: a list of phrases is joined with commas."""
    phrases = value if isinstance(value, list) else [value]
    if not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError("should be a text or a list of texts")
    if isinstance(value, list) and not all(phrase.strip() for phrase in phrases):
        raise ValueError("should not contain empty phrases")
    return ", ".join(phrase.strip() for phrase in phrases)


Text = Annotated[str, pydantic.AfterValidator(_without_control_characters)]
Name = Annotated[Text, pydantic.BeforeValidator(number_as_text)]  # 7 is the name "7"
Context = Annotated[Text, pydantic.BeforeValidator(phrases_as_text)]
Task = Literal[tuple(TASKS)]
Language = Annotated[str, pydantic.AfterValidator(languages.parse)]
Seconds = Annotated[float, pydantic.Field(ge=0, le=MAX_SECONDS)]
Length = Annotated[float, pydantic.Field(ge=1 / SAMPLE_RATE, le=MAX_SECONDS)]
Count = Annotated[int, pydantic.Field(ge=0)]


class Segment(schema.Schema):
    """A timed part of a transcript."""

    start: Seconds
    end: Seconds
    text: Text = ""


Segments = Annotated[tuple[Segment, ...], pydantic.Field(strict=False)]
