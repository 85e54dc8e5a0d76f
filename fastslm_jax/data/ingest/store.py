"""What an import leaves on disk: shards of clips, and an index with all that plans need.

DIR/shard-00000.array_record …  ArrayRecord; a record is the clip's JSON (its length first, 4 bytes) and its FLAC, 16 kHz mono
DIR/index.jsonl                 one line a clip, in the source's order
DIR/rejected.jsonl              one line a clip that could not be used: file, line, id, kind, reason
DIR/dataset.json                settings and totals; written last, so a folder without it holds an unfinished import
"""

import functools
import io
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator

import numpy as np
import soundfile
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.errors import UserError

INDEX, REJECTED, DATASET = "index.jsonl", "rejected.jsonl", "dataset.json"
_WRITER = (
    "group_size:1,uncompressed"  # one clip a chunk, for random access; FLAC is compressed already
)
_OPEN_READERS = 64


class StoreError(UserError):
    """A folder or shard that cannot be read as an import."""


def encode(fields: dict, samples: np.ndarray) -> bytes:
    """A record of int16 samples [n] and what is known of them."""
    header, flac = json.dumps(fields, ensure_ascii=False).encode(), io.BytesIO()
    soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return struct.pack("<I", len(header)) + header + flac.getvalue()


def decode(record: bytes) -> tuple[dict, np.ndarray]:
    """The fields and the int16 samples of a record."""
    (length,) = struct.unpack_from("<I", record)
    samples, _ = soundfile.read(io.BytesIO(memoryview(record)[4 + length :]), dtype="int16")
    return json.loads(record[4 : 4 + length]), samples


def write_text(path: pathlib.Path, lines: Iterable[str]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(temporary, path)


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> int:
    """Writes a shard, whole or not at all, and nothing when there are no records. Returns their number."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count, writer = 0, ArrayRecordWriter(str(temporary), _WRITER)
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
    return count


@functools.lru_cache(_OPEN_READERS)
def _reader(path: str) -> ArrayRecordReader:
    try:
        return ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
        )
    except RuntimeError as error:
        raise StoreError(f"{path}: not a readable shard ({error}); import it again") from None


def read_record(path: str, number: int) -> tuple[dict, np.ndarray]:
    """Fields and int16 samples of a record of a shard; any thread, any order.

    Raises:
        StoreError: the shard is missing, damaged or has no such record.
    """
    if not os.path.isfile(path):
        raise StoreError(f"{path}: no such shard; import it again")
    reader = _reader(path)
    if not 0 <= number < reader.num_records():
        raise StoreError(
            f"{path}: has {reader.num_records()} records, not number {number}; import it again"
        )
    try:
        return decode(reader.read([number])[0])
    except (RuntimeError, struct.error, ValueError, soundfile.LibsndfileError) as error:
        raise StoreError(f"{path}: record {number} is damaged ({error}); import it again") from None


def description(folder: str | os.PathLike) -> dict:
    """dataset.json of a finished import.

    Raises:
        StoreError: the folder holds none.
    """
    path = pathlib.Path(folder) / DATASET
    if not path.is_file():
        raise StoreError(
            f"{folder}: holds no finished import ({DATASET} is missing); run python -m fastslm_jax.data.ingest again"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def index_lines(folder: str | os.PathLike) -> Iterator[dict]:
    """The lines of the index, in their order."""
    with open(pathlib.Path(folder) / INDEX, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
