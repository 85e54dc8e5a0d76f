"""Sources of an import.

A source has numbered entries. Every entry is read independently, so any process can read any entry.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastslm_jax.data.ingest import decoding
from fastslm_jax.data.ingest.decoding import Rejected
from fastslm_jax.data.manifest import ManifestError, Utterance, parse_json, parse_utterance
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

    Only the byte offset of every line is kept in memory.
    """

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"jsonl:{path}: no such manifest")
        self.root = self.path.parent.resolve()
        digest, starts, lines, at = hashlib.sha256(), [], [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    starts.append(at)
                    lines.append(number)
                at += len(line)
        self.starts, self.lines = np.array(starts, np.int64), np.array(lines, np.int64)
        self._fingerprint = digest.hexdigest()

    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.starts)

    def place(self, number: int) -> tuple[str, int]:
        return self.path.name, int(self.lines[number])

    def entry(self, number: int) -> Entry:
        with open(self.path, "rb") as file:
            file.seek(self.starts[number])
            line = file.readline()
        where = "{}:{}".format(*self.place(number))
        try:
            fields = parse_json(line.decode(), where)
            utterance = parse_utterance(fields, self.root, where)
        except UnicodeDecodeError as error:
            raise Rejected(
                "broken_json", f"not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        except ManifestError as error:
            raise Rejected(error.kind, error.reason) from None
        return Entry(utterance, utterance.path, is_whole="offset" not in fields)


def _transcribed(
    text: str, *, id: str, speaker: str, recording: str, path: str = "", lang: str = "en"
) -> Utterance:
    """An utterance of a source without tasks; it extends to the end of its audio."""
    return Utterance(
        path=path,
        offset=0.0,
        seconds=0.0,
        task="asr",
        instruction=None,
        answer=text,
        text=text,
        lang=lang,
        speaker=speaker,
        recording=recording,
        id=id,
    )


class LibriSpeech:
    """LibriSpeech's folders: SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt next to the flac files.

    Transcripts are converted to lower case.
    """

    def __init__(self, root: str) -> None:
        self.root = pathlib.Path(root)
        files = sorted(self.root.rglob("*.trans.txt"))
        if not files:
            raise UserError(
                f"librispeech:{root}: no *.trans.txt files; give the folder of the unpacked archive"
            )
        digest = hashlib.sha256()
        self.entries: list[tuple[str, int, str]] = []  # file, line, text
        for file in files:
            text, name = file.read_text(encoding="utf-8"), file.relative_to(self.root).as_posix()
            digest.update(f"{name}\n{text}".encode())
            self.entries += [
                (name, number, line)
                for number, line in enumerate(text.splitlines(), 1)
                if line.strip()
            ]
        self._fingerprint = digest.hexdigest()

    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.entries)

    def place(self, number: int) -> tuple[str, int]:
        return self.entries[number][:2]

    def entry(self, number: int) -> Entry:
        file, _, line = self.entries[number]
        name, _, text = line.strip().partition(" ")
        parts = name.split("-")
        if len(parts) != 3:
            raise Rejected("bad_field", f"{name!r} is not SPEAKER-CHAPTER-NUMBER")
        path = str((self.root / file).parent / f"{name}.flac")
        utterance = _transcribed(
            text.lower(), id=name, speaker=parts[0], recording="-".join(parts[:2]), path=path
        )
        return Entry(utterance, path)


# Field names of public datasets; the first that exists is used.
_AUDIO = ("audio", "speech", "voice")
_TEXT = ("text", "sentence", "normalized_text", "transcription", "transcript")
_SPEAKER = ("speaker_id", "client_id", "speaker")
_RECORDING = ("chapter_id", "recording", "recording_id", "audio_id")
_LANGUAGE = ("lang", "locale", "language")


def _first(fields: dict, names: Sequence[str], default: str | None = None) -> object:
    """The value of the first field that exists, bytes decoded as text."""
    value = next((fields[name] for name in names if fields.get(name) is not None), default)
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

    def _entry(self, number: int, fields: dict, audio: bytes | tuple[np.ndarray, int]) -> Entry:
        text = _first(fields, _TEXT)
        if not isinstance(text, str):
            raise Rejected(
                "bad_field",
                f"no text field among {', '.join(sorted(fields))}; expected one of "
                f"{', '.join(_TEXT)}",
            )
        name = f"{self.name}:{number + 1}"
        utterance = _transcribed(
            text,
            id=name,
            speaker=str(_first(fields, _SPEAKER, "")),
            recording=str(_first(fields, _RECORDING, name)),
            lang=self.lang or str(_first(fields, _LANGUAGE, "en")),
        )
        return Entry(utterance, audio)


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
        fields, features = source[number], source.dataset_info.features
        key = next((name for name in _AUDIO if name in fields), None)
        if key is None:
            raise Rejected("bad_field", f"no audio field among {', '.join(sorted(fields))}")
        samples = np.asarray(fields[key])
        rate = getattr(features[key], "sample_rate", None) or 16_000
        samples = samples if samples.ndim == 1 else samples.mean(axis=-1)
        if not np.issubdtype(samples.dtype, np.floating) or np.abs(samples).max(initial=0) > 1.5:
            samples = samples / 32768.0  # the audio feature has the range of int16 in any dtype
        return self._entry(number, fields, (samples.astype(np.float32), rate))


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
            except (ValueError, OSError) as error:
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
        fields = self._open()[number]
        audio = fields.pop(self.key)
        if audio["bytes"] is None and not os.path.isfile(audio["path"] or ""):
            raise Rejected("missing_file", f"{audio['path']}: no such audio file")
        content = audio["bytes"] or pathlib.Path(audio["path"]).read_bytes()
        return self._entry(number, fields, content)


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
    if rest and kind == "jsonl":
        return JsonLines(os.path.expanduser(rest))
    if rest and kind == "librispeech":
        return LibriSpeech(os.path.expanduser(rest))
    if rest and kind == "tfds":
        return TensorFlowDatasets(rest, data_dir, lang)
    if rest and kind == "hf":
        return HuggingFace(rest, lang)
    raise UserError(f"source {spec!r} is not one of {SOURCES}")
