"""The files of an imported folder: shards of clips, and an index from which rows are planned.

DIR/shard-00000.array_record …  ArrayRecord shards, one clip per record: a 4-byte header length, a
                                JSON header, and FLAC audio (16 kHz, mono)
DIR/index.jsonl                 one line per clip, in the source's order
DIR/rejected.jsonl              one line per rejected clip: file, line, id, kind, reason
DIR/dataset.json                settings, totals and the index's checksum; written last: without it,
                                the import is not finished
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, TextIO, TypeVar

import numpy as np
import pydantic
import soundfile
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fastslm_jax import schema
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import fields
from fastslm_jax.errors import UserError

INDEX, REJECTED, DATASET = "index.jsonl", "rejected.jsonl", "dataset.json"
# One clip per chunk, for random access; uncompressed, since FLAC is already compressed.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_OPEN_READERS = 64
_DAMAGED = "the import is damaged: remove its folder and import it again"


class StoreError(UserError):
    """An imported folder or one of its shards cannot be read."""


_ShardName = Annotated[str, pydantic.Field(pattern=r"^shard-\d{5,}\.array_record$")]


class Dataset(schema.Schema):
    """dataset.json: what other code reads of it."""

    tokenizer: str | None = None
    clips: fields.Count
    seconds: float
    windows: fields.Count
    rejected: dict[str, int]
    shards: list[_ShardName]
    index_sha256: str | None = None  # missing in folders of earlier versions


class IndexLine(schema.Schema):
    """A line of index.jsonl: a clip, and where it is stored."""

    id: str
    offset: fields.Seconds
    seconds: fields.Length
    windows: fields.Count
    text_tokens: fields.Count | None = None
    joined_tokens: fields.Count | None = None
    task: fields.Task
    lang: fields.Language
    speaker: str
    recording: str
    text: str
    prompt: str | None = None
    answer: str
    segments: fields.Segments = ()
    context: str = ""
    no_speech: bool = False
    shard: _ShardName
    record: fields.Count


_Checked = TypeVar("_Checked", bound=schema.Schema)


def read_json(path: pathlib.Path, content: type[_Checked]) -> dict:
    """Reads a JSON file of an imported folder.

    Args:
        content: what it must contain.

    Raises:
        StoreError: it is damaged.
    """
    try:
        read = schema.parse_json(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path}: {error}; {_DAMAGED}") from None
    schema.check(content, read, path, lambda message: StoreError(f"{message}; {_DAMAGED}"))
    return read


def encode(fields: dict, samples: np.ndarray) -> bytes:
    """Encodes a record: JSON fields and int16 samples [n]."""
    header, flac = json.dumps(fields, ensure_ascii=False).encode(), io.BytesIO()
    soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return struct.pack("<I", len(header)) + header + flac.getvalue()


def decode(record: bytes) -> tuple[dict, np.ndarray]:
    """Decodes a record: JSON fields and int16 samples [n]."""
    (length,) = struct.unpack_from("<I", record)
    samples, _ = soundfile.read(io.BytesIO(memoryview(record)[4 + length :]), dtype="int16")
    return json.loads(record[4 : 4 + length]), samples


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_writer(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens a text file that gets its name only when it is complete."""
    temporary = _temporary(path)
    with open(temporary, "w", encoding="utf-8") as file:
        yield file
    os.replace(temporary, path)


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """Writes a shard atomically. Without records, no file is written."""
    temporary = _temporary(path)
    count, writer = 0, ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    if count:
        os.replace(temporary, path)
    else:
        temporary.unlink()


@functools.lru_cache(_OPEN_READERS)
def _reader(path: str) -> ArrayRecordReader:
    try:
        return ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
        )
    except RuntimeError as error:
        raise StoreError(f"{path}: not a readable shard ({error}); import it again") from None


def read_record(path: str, number: int) -> tuple[dict, np.ndarray]:
    """Reads JSON fields and int16 samples [n] of a record. Safe to call from any thread.

    Raises:
        StoreError: the shard is missing or damaged, or has no such record.
    """
    if not os.path.isfile(path):
        raise StoreError(f"{path}: no such shard; import it again")
    reader = _reader(path)
    if not 0 <= number < reader.num_records():
        raise StoreError(
            f"{path}: record {number} does not exist, the shard has {reader.num_records()}; "
            "import it again"
        )
    try:
        return decode(reader.read([number])[0])
    except (RuntimeError, struct.error, ValueError, soundfile.LibsndfileError) as error:
        raise StoreError(f"{path}: record {number} is damaged ({error}); import it again") from None


def description(folder: str | os.PathLike) -> dict:
    """Reads dataset.json of a finished import.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = pathlib.Path(folder) / DATASET
    if not path.is_file():
        raise StoreError(
            f"{folder}: not a finished import ({DATASET} is missing); run python -m "
            "fastslm_jax.data.ingest again"
        )
    return read_json(path, Dataset)


def checksum(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_lines(folder: str | os.PathLike) -> Iterator[IndexLine]:
    """Yields the lines of the index in order.

    Raises:
        StoreError: the index is missing or damaged.
    """
    dataset, path = description(folder), pathlib.Path(folder) / INDEX
    if not path.is_file():
        raise StoreError(f"{path}: no such file; {_DAMAGED}")
    known = dataset.get("index_sha256")
    if known and checksum(path) != known:
        raise StoreError(f"{path}: is not the index that the import wrote; {_DAMAGED}")
    count, first_use = 0, {}
    with open(path, "rb") as file:
        for count, content in enumerate(file, 1):
            where = f"{path}:{count}"
            try:
                read = schema.parse_json(content)
            except ValueError as error:
                raise StoreError(f"{where}: {error}; {_DAMAGED}") from None
            line = schema.check(IndexLine, read, where, StoreError)
            if first_use.setdefault(line.id, count) != count:
                raise StoreError(f"{where}: the id {line.id!r} occurs twice; {_DAMAGED}")
            yield line
    if count != dataset["clips"]:
        raise StoreError(
            f"{path}: has {count} clips, {DATASET} says {dataset['clips']}; {_DAMAGED}"
        )
