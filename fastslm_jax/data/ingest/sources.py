"""Sources of an import.

A source has numbered entries. Every entry is read independently, so any process can read any entry.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pydantic

from fastslm_jax import schema
from fastslm_jax.data import fields
from fastslm_jax.data.ingest import decoding, store
from fastslm_jax.data.ingest.decoding import Rejected
from fastslm_jax.data.manifest import (
    ManifestError,
    Utterance,
    numbered_lines,
    parse_json,
    parse_utterance,
)
from fastslm_jax.errors import UserError

if TYPE_CHECKING:
    import datasets

SOURCES = "jsonl:FILE, librispeech:FOLDER, tfds:NAME/CONFIG[:SPLIT] or hf:NAME/CONFIG[:SPLIT]"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a source.

    Attributes:
        utterance: the entry's metadata; `seconds` 0 means to the end of the file.
        audio: a path, the content of a file, or float samples [n] and their rate.
        is_whole: whether the utterance is expected to be the whole file.
    """

    utterance: Utterance
    audio: str | bytes | tuple[np.ndarray, int]
    is_whole: bool = False

    def samples(self, tolerance: float) -> np.ndarray:
        """Decodes int16 samples [n] at 16 kHz.

        Args:
            tolerance: seconds by which the file may differ from the utterance.

        Raises:
            Rejected: the audio cannot be used.
        """
        if isinstance(self.audio, tuple):
            return decoding.from_float(*self.audio)
        u = self.utterance
        return decoding.decode(
            self.audio, u.offset, u.seconds, is_whole=self.is_whole, tolerance=tolerance
        )


class CorpusSource(Protocol):
    """Entries 0 to len - 1. Sources can be pickled for worker processes."""

    def fingerprint(self) -> str:
        """Changes when the entries change."""

    def __len__(self) -> int: ...

    def place(self, number: int) -> tuple[str, int]:
        """File and line (from 1) of an entry, for messages."""

    def entry(self, number: int) -> Entry:
        """Reads an entry. Raises Rejected if its metadata cannot be used."""


class JsonLines:
    """A manifest with NeMo's keys (see `data.manifest`).

    Only the place of every line is kept in memory.
    """

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"jsonl:{path}: no such manifest")
        self.root = self.path.parent.resolve()
        found = [(number, at, len(line)) for number, at, line in numbered_lines(self.path)]
        self.lines, self.starts, self.sizes = np.array(found, np.int64).reshape(-1, 3).T
        self._fingerprint = store.checksum(self.path)

    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.starts)

    def place(self, number: int) -> tuple[str, int]:
        return self.path.name, int(self.lines[number])

    def entry(self, number: int) -> Entry:
        with open(self.path, "rb") as file:
            file.seek(self.starts[number])
            content = file.read(self.sizes[number])
        where = "{}:{}".format(*self.place(number))
        try:
            line = parse_json(content, where)
            utterance = parse_utterance(line, self.root, where)
        except ManifestError as error:
            raise Rejected(error.kind, error.reason) from None
        return Entry(utterance, utterance.path, is_whole=line.get("offset") is None)


class _Transcribed(schema.Schema):
    """An entry of a source without tasks."""

    id: fields.Name
    text: fields.Text
    speaker: fields.Name = ""
    recording: fields.Name
    lang: fields.Language = "en"


def _transcribed(entry: dict, path: str = "") -> Utterance:
    """An utterance of a source without tasks; it extends to the end of its audio.

    Raises:
        Rejected: a field is invalid.
    """
    try:
        known = _Transcribed.model_validate(entry)
    except pydantic.ValidationError as error:
        raise Rejected("bad_field", schema.describe(error)) from None
    return Utterance(
        **known.model_dump(),
        path=path,
        offset=0.0,
        seconds=0.0,
        task="asr",
        instruction=None,
        answer=known.text,
    )


_TRANSCRIPTS = ".trans.txt"


class LibriSpeech:
    """LibriSpeech's folders: SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt next to the flac files.

    Transcripts are converted to lower case. Hidden files, which some systems add, are ignored.
    """

    def __init__(self, root: str) -> None:
        self.root = pathlib.Path(root)
        files = sorted(
            file
            for file in self.root.rglob(f"*{_TRANSCRIPTS}")
            if file.is_file() and not file.name.startswith(".")
        )
        if not files:
            raise UserError(
                f"librispeech:{root}: no *{_TRANSCRIPTS} files; give the folder of the unpacked "
                "archive"
            )
        digest = hashlib.sha256()
        self.entries: list[tuple[str, int, bytes]] = []  # file, line, content
        for file in files:
            name = file.relative_to(self.root).as_posix()
            digest.update(os.fsencode(f"{name}\n") + file.read_bytes())
            self.entries += [(name, number, line) for number, _, line in numbered_lines(file)]
        self._fingerprint = digest.hexdigest()

    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.entries)

    def place(self, number: int) -> tuple[str, int]:
        return self.entries[number][:2]

    def entry(self, number: int) -> Entry:
        file, _, line = self.entries[number]
        try:
            name, _, text = line.decode().partition(" ")
        except UnicodeDecodeError as error:
            raise Rejected("bad_field", f"not UTF-8 text ({error.reason})") from None
        chapter = pathlib.PurePath(file).name.removesuffix(_TRANSCRIPTS)
        if not re.fullmatch(rf"{re.escape(chapter)}-\w+", name):
            raise Rejected("bad_field", f"{name!r} is not {chapter}-NUMBER")
        path = str((self.root / file).parent / f"{name}.flac")
        fields = {"id": name, "text": text.lower(), "speaker": chapter.partition("-")[0]}
        return Entry(_transcribed(fields | {"recording": chapter}, path), path)


# Field names of public datasets; the first that exists is used.
_AUDIO = ("audio", "speech", "voice")
_TEXT = ("text", "sentence", "normalized_text", "transcription", "transcript")
_SPEAKER = ("speaker_id", "client_id", "speaker")
_RECORDING = ("chapter_id", "recording", "recording_id", "audio_id")
_LANGUAGE = ("lang", "locale", "language")


def _first(row: dict, names: Sequence[str], default: str | None = None) -> object:
    """The value of the first field that exists; bytes as text, and NumPy scalars as Python's."""
    value = next((row[name] for name in names if row.get(name) is not None), default)
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else value


class _Table:
    """A dataset of rows with the field names above; ids combine its name and the row number.

    Attributes:
        name: the source as the user wrote it.
        lang: language of all rows ("": the row's own field, or English).
    """

    name: str
    lang: str

    def place(self, number: int) -> tuple[str, int]:
        return self.name, number + 1

    def _entry(self, number: int, row: dict, audio: bytes | tuple[np.ndarray, int]) -> Entry:
        if _first(row, _TEXT) is None:
            raise Rejected(
                "bad_field",
                f"no text field among {', '.join(sorted(row))}; expected one of {', '.join(_TEXT)}",
            )
        name = f"{self.name}:{number + 1}"
        entry = {
            "id": name,
            "text": _first(row, _TEXT),
            "speaker": _first(row, _SPEAKER),
            "recording": _first(row, _RECORDING, name),
            "lang": self.lang or _first(row, _LANGUAGE),
        }
        return Entry(_transcribed(entry), audio)


class TensorFlowDatasets(_Table):
    """NAME[/CONFIG][:SPLIT] of TensorFlow Datasets, read with `tfds.data_source` (random access).

    The dataset must be prepared as ArrayRecord.
    """

    def __init__(self, spec: str, data_dir: str | None, lang: str) -> None:
        self.builder, _, split = spec.partition(":")
        self.split, self.data_dir = split or "train", data_dir
        self.lang, self.name = lang, f"tfds:{spec}"
        self._source = None

    def __getstate__(self) -> dict:  # every process opens the dataset itself
        return {**self.__dict__, "_source": None}

    def _open(self) -> Sequence[dict]:
        if self._source is None:
            import tensorflow_datasets as tfds

            try:
                self._source = tfds.data_source(
                    self.builder, split=self.split, data_dir=self.data_dir
                )
            except (ValueError, NotImplementedError, tfds.core.DatasetNotFoundError) as error:
                raise UserError(f"{self.name}: {str(error).splitlines()[0]}") from None
        return self._source

    def fingerprint(self) -> str:
        info = self._open().dataset_info
        return f"{info.full_name} {self.split} {len(self)}"

    def __len__(self) -> int:
        return len(self._open())

    def entry(self, number: int) -> Entry:
        source = self._open()
        row, features = source[number], source.dataset_info.features
        key = next((name for name in _AUDIO if name in row), None)
        if key is None:
            raise Rejected("bad_field", f"no audio field among {', '.join(sorted(row))}")
        samples = np.asarray(row[key])
        rate = getattr(features[key], "sample_rate", None) or 16_000
        samples = samples if samples.ndim == 1 else samples.mean(axis=-1)
        if not np.issubdtype(samples.dtype, np.floating) or np.abs(samples).max(initial=0) > 1.5:
            samples = samples / 32768.0  # the audio feature has the range of int16 in any dtype
        return self._entry(number, row, (samples.astype(np.float32), rate))


class HuggingFace(_Table):
    """NAME[/CONFIG][:SPLIT] or FOLDER[:SPLIT] of Hugging Face datasets.

    CONFIG is everything after the second slash.
    """

    def __init__(self, spec: str, lang: str) -> None:
        path, _, split = spec.partition(":")
        self.split, self.lang, self.name = split or "train", lang, f"hf:{spec}"
        self.path, self.config = path, None
        parts = path.split("/")
        if not os.path.isdir(path) and len(parts) > 2:
            self.path, self.config = "/".join(parts[:2]), "/".join(parts[2:])
        self._source = None

    def __getstate__(self) -> dict:  # every process opens the dataset itself
        return {**self.__dict__, "_source": None}

    def _open(self) -> "datasets.Dataset":
        if self._source is None:
            try:
                import datasets
            except ImportError:
                raise UserError(
                    f"{self.name}: needs Hugging Face datasets; pip install fastslm-jax[hf]"
                ) from None
            try:
                source = datasets.load_dataset(self.path, self.config, split=self.split)
            except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
                raise UserError(f"{self.name}: {str(error).splitlines()[0]}") from None
            self.key = next((name for name in _AUDIO if name in source.features), None)
            if self.key is None:
                raise UserError(
                    f"{self.name}: no audio field among {', '.join(source.features)}; expected one "
                    f"of {', '.join(_AUDIO)}"
                )
            self._source = source.cast_column(self.key, datasets.Audio(decode=False))
        return self._source

    def fingerprint(self) -> str:
        info = self._open().info
        return json.dumps([self.path, self.config, self.split, str(info.version), len(self)])

    def __len__(self) -> int:
        return len(self._open())

    def entry(self, number: int) -> Entry:
        row = self._open()[number]
        audio = row.pop(self.key)
        if audio is None:
            raise Rejected("missing_file", "the audio field is empty")
        if audio["bytes"] is None and not os.path.isfile(audio["path"] or ""):
            raise Rejected("missing_file", f"{audio['path']}: no such audio file")
        content = audio["bytes"] or pathlib.Path(audio["path"]).read_bytes()
        return self._entry(number, row, content)


def open_source(spec: str, data_dir: str | None = None, lang: str = "") -> CorpusSource:
    """Opens a source.

    Args:
        spec: one of SOURCES.
        data_dir: folder of TensorFlow Datasets (None: its default).
        lang: language of a tfds or hf dataset ("": the row's own field, or English).

    Raises:
        UserError: there is no such source.
    """
    kind, _, rest = spec.partition(":")
    if lang and kind in ("jsonl", "librispeech"):
        raise UserError(f"--lang={lang}: only for tfds: and hf:; a manifest names it in each line")
    if rest and kind == "jsonl":
        return JsonLines(os.path.expanduser(rest))
    if rest and kind == "librispeech":
        return LibriSpeech(os.path.expanduser(rest))
    if rest and kind == "tfds":
        return TensorFlowDatasets(rest, data_dir, lang)
    if rest and kind == "hf":
        return HuggingFace(rest, lang)
    raise UserError(f"source {spec!r} is not one of {SOURCES}")
