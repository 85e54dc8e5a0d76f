"""Schemas of files that users give: one pydantic model for each kind of file.

A value of the wrong type or out of range is an error with one line: the file (and line), the field,
the value, and what is allowed. Types are strict: "2" is not a number, and true is not 1. Fields
that a schema does not name are ignored.
"""

import json
import os
import re
import sys
from typing import Any, TypeVar

import pydantic

from fastslm_jax.errors import UserError

_SHOWN = 60  # characters of a wrong value in a message


class Schema(pydantic.BaseModel):
    """Base of all schemas. An optional field that is null has its default, as if it were absent."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, extra="ignore"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        required = {field.alias or name for name, field in cls.model_fields.items()}
        required -= {
            field.alias or name
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }
        return {key: value for key, value in fields.items() if value is not None or key in required}


Checked = TypeVar("Checked", bound=Schema)


def check(
    schema: type[Checked],
    fields: object,
    where: str | os.PathLike,
    error: type[UserError] = UserError,
) -> Checked:
    """Checks the fields of a file and returns them typed.

    Example: Clip, {"duration": "2"}, "train.jsonl:7" raises
    "train.jsonl:7: duration is "2", should be a valid number".

    Args:
        schema: what the file may contain.
        fields: what it contains, as read from JSON.
        where: the file, and the line if it has several.
        error: the exception to raise; called with the message.

    Raises:
        UserError: a field is missing, or its value is not allowed.
    """
    try:
        return schema.model_validate(fields)
    except pydantic.ValidationError as invalid:
        raise error(f"{where}: {describe(invalid)}") from None


def describe(invalid: pydantic.ValidationError) -> str:
    """The first problem that pydantic found, and the number of others."""
    first, *others = invalid.errors(include_url=False)
    name = ""
    for part in first["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    if first["type"] == "missing":
        text = f"{name!r} is missing"
    else:
        expected = re.sub("^(Input|String|Value error,) ", "", first["msg"])
        expected = expected.partition(" or instance of ")[0]
        text = f"{name or 'the content'} is {_shown(first['input'])}, {expected}"
    return text + (f" (and {len(others)} more)" if others else "")


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a deep list
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in fields if names.count(name) > 1))
    return fields


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: it is not JSON in UTF-8, has a number of thousands of digits, is nested too
            deeply, names a key of an object twice, or contains half of a surrogate pair, which
            could not be written back.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            # Half of a surrogate pair is accepted by json, but cannot be written as UTF-8.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except KeyError as error:
        raise ValueError(f"JSON with two values for {error}") from None
    except ValueError:
        raise ValueError(
            f"JSON with a number of more than {sys.get_int_max_str_digits()} digits"
        ) from None
