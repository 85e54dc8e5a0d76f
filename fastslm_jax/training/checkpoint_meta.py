"""The metadata of a checkpoint: config, row number, fingerprints and checksums."""

import json
import pathlib
import zlib
from collections.abc import Mapping

import pydantic

from fastslm_jax import schema
from fastslm_jax.errors import UserError

FORMAT = 2


class CheckpointError(UserError):
    """A checkpoint, or a folder of checkpoints, that cannot be used."""


class TornCheckpointError(CheckpointError):
    """A checkpoint that is damaged or incomplete."""


class _Meta(schema.Schema):
    """The metadata that a checkpoint must have."""

    format: int
    crc32: int
    row: int = pydantic.Field(default=0, ge=0)  # the demo's pretraining has no rows
    config: dict = pydantic.Field(default_factory=dict)
    bases: dict[str, str] = pydantic.Field(default_factory=dict)
    checksums: dict[str, dict[str, str]]
    scores: dict[str, float] = pydantic.Field(default_factory=dict)  # of the dev set


def sealed(meta: Mapping) -> dict:
    """The metadata with its format and its own checksum, as it is stored."""
    meta = {"format": FORMAT, **meta}
    return meta | {"crc32": _crc32(meta)}


def read(folder: pathlib.Path) -> dict:
    """The metadata of the checkpoint in a folder.

    Raises:
        TornCheckpointError: it is unreadable, or differs from what was written.
        CheckpointError: it was written by an incompatible version.
    """
    file = folder / "meta" / "metadata"
    try:
        meta = schema.parse_json(file.read_bytes())
        schema.check(_Meta, meta, file, TornCheckpointError)
    except (OSError, ValueError) as error:
        raise TornCheckpointError(f"{folder}: unreadable meta ({error})") from None
    if meta.pop("crc32") != _crc32(meta):
        raise TornCheckpointError(f"{folder}: meta does not match its crc32")
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: has format {meta['format']}, this version reads {FORMAT}; use the version "
            "that wrote it"
        )
    return meta


def _crc32(meta: Mapping) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
