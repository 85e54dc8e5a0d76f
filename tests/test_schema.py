"""One line for a value that a schema does not allow."""

import pydantic
import pytest

from fastslm_jax import schema
from fastslm_jax.errors import UserError


class Span(schema.Schema):
    start: float = pydantic.Field(ge=0)
    text: str = ""


class Clip(schema.Schema):
    duration: float = pydantic.Field(gt=0)
    speaker: str = "unknown"
    spans: tuple[Span, ...] = pydantic.Field(default=(), strict=False)


def test_values_are_typed():
    clip = schema.check(Clip, {"duration": 2, "spans": [{"start": 0.5}], "other": {}}, "m:1")
    assert clip == Clip(duration=2.0, spans=(Span(start=0.5),))


def test_null_is_absent():
    clip = schema.check(Clip, {"duration": 1.0, "speaker": None, "spans": None}, "m:1")
    assert (clip.speaker, clip.spans) == ("unknown", ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "m:7: 'duration' is missing"),
        ({"duration": None}, "m:7: duration is null, should be a valid number"),
        ({"duration": "2"}, 'm:7: duration is "2", should be a valid number'),
        ({"duration": True}, "m:7: duration is true, should be a valid number"),
        ({"duration": float("nan")}, "m:7: duration is NaN, should be a finite number"),
        ({"duration": 10**400}, "m:7: duration is 1000"),
        ({"duration": 0}, "m:7: duration is 0, should be greater than 0"),
        (
            {"duration": 1.0, "speaker": ["a"]},
            'm:7: speaker is ["a"], should be a valid string',
        ),
        (
            {"duration": 1.0, "spans": [{"start": 0.0}, {"start": -1.0, "text": 5}]},
            "m:7: spans[1].start is -1.0, should be greater than or equal to 0 (and 1 more)",
        ),
        ([], "m:7: the content is [], should be a valid dictionary"),
    ],
)
def test_wrong_values_are_one_line(fields, message):
    with pytest.raises(UserError) as error:
        schema.check(Clip, fields, "m:7")
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        (b"\xff", "not UTF-8 text"),
        ('"\\ud800"', "not UTF-8 text"),
        ('{"a": {"b": 1, "b": 2}}', "JSON with two values for 'b'"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        ("9" * 5000, "JSON with a number of more than 4300 digits"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_json_that_cannot_be_used(text, message):
    with pytest.raises(ValueError, match=message):
        schema.parse_json(text)
