"""What can be imported. A source has numbered entries; an entry is read alone, so any process can read any of them."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fastslm_jax.data.ingest import decoding
from fastslm_jax.data.ingest.decoding import Rejected
from fastslm_jax.data.manifest import ManifestError, Utterance, parse_json, parse_utterance
from fastslm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a source says of a clip (`seconds` 0: the whole file), and its audio: a path, a file's bytes, or samples and a rate.

    whole: the seconds are said to be those of the whole file.
    """

    utterance: Utterance
    audio: str | bytes | tuple[np.ndarray, int]
    whole: bool = False

    def samples(self, tolerance: float) -> np.ndarray:
        """int16 samples at 16 kHz; raises Rejected."""
        if isinstance(self.audio, tuple):
            return decoding.from_float(*self.audio)
        u = self.utterance
        return decoding.decode(
            self.audio, u.offset, u.seconds, whole=self.whole, tolerance=tolerance
        )


class CorpusSource(Protocol):
    """Entries 0 … len − 1. Can be pickled, for worker processes."""

    def fingerprint(self) -> str:
        """Changes when the entries do."""

    def __len__(self) -> int: ...

    def place(self, number: int) -> tuple[str, int]:
        """The file and line (from 1) of an entry, for people."""

    def entry(self, number: int) -> Entry:
        """Raises Rejected."""


class JsonLines:
    """A manifest with NeMo's keys; see `data.manifest`. Lines are found by their place in the file, none is kept in memory."""

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"jsonl:{path}: no such manifest")
        self.root, digest, starts, lines, at = (
            self.path.parent.resolve(),
            hashlib.sha256(),
            [],
            [],
            0,
        )
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    starts.append(at)
                    lines.append(number)
                at += len(line)
        self.starts, self.lines, self._fingerprint = (
            np.array(starts, np.int64),
            np.array(lines, np.int64),
            digest.hexdigest(),
        )

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
        return Entry(utterance, utterance.path, whole="offset" not in fields)


def _utterance(task: str = "asr", **fields) -> Utterance:
    """An utterance of a source that knows no seconds and no tasks."""
    defaults = {
        "offset": 0.0,
        "seconds": 0.0,
        "instruction": None,
        "lang": "en",
        "speaker": "",
        "path": "",
    }
    return Utterance(**{**defaults, "task": task, "answer": fields["text"], **fields})


class LibriSpeech:
    """LibriSpeech's folders: SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside the flac files. Transcripts become lower case."""

    def __init__(self, root: str):
        self.root = pathlib.Path(root)
        files = sorted(self.root.rglob("*.trans.txt"))
        if not files:
            raise UserError(
                f"librispeech:{root}: holds no *.trans.txt; name the folder that was unpacked"
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
        utterance = _utterance(
            path=path, text=text.lower(), speaker=parts[0], recording="-".join(parts[:2]), id=name
        )
        return Entry(utterance, path)


# Field names of public data sets, the first that is there.
_AUDIO = ("audio", "speech", "voice")
_TEXT = ("text", "sentence", "normalized_text", "transcription", "transcript")
_SPEAKER = ("speaker_id", "client_id", "speaker")
_RECORDING = ("chapter_id", "recording", "recording_id", "audio_id")
_LANGUAGE = ("lang", "locale", "language")


def _first(fields: dict, names: Sequence[str], default=None):
    value = next((fields[name] for name in names if fields.get(name) is not None), default)
    return value.decode() if isinstance(value, bytes) else value


class _Table:
    """A data set whose rows are dicts with the field names above; ids are its name and the row's number."""

    name: str
    lang: str  # of all rows; "": what each says, or English

    def place(self, number: int) -> tuple[str, int]:
        return self.name, number + 1

    def _entry(self, number: int, fields: dict, sound: bytes | tuple[np.ndarray, int]) -> Entry:
        text = _first(fields, _TEXT)
        if not isinstance(text, str):
            raise Rejected(
                "bad_field",
                f"no text among {', '.join(sorted(fields))}; one of {', '.join(_TEXT)} is expected",
            )
        utterance = _utterance(
            text=text, id=f"{self.name}:{number + 1}", lang=self.lang or str(_first(fields, _LANGUAGE, "en")),
            speaker=str(_first(fields, _SPEAKER, "")), recording=str(_first(fields, _RECORDING, f"{self.name}:{number + 1}")),
        )  # fmt: skip
        return Entry(utterance, sound)


class TensorFlowDatasets(_Table):
    """NAME[/CONFIG][:SPLIT] of TensorFlow Datasets, through `tfds.data_source` (random access; prepared as ArrayRecord)."""

    def __init__(self, spec: str, data_dir: str | None, lang: str):
        self.builder, _, split = spec.partition(":")
        self.split, self.data_dir, self.lang, self.name = (
            split or "train",
            data_dir,
            lang,
            f"tfds:{spec}",
        )
        self._source = None

    def __getstate__(self):
        return {**self.__dict__, "_source": None}  # each process opens its own

    def _open(self):
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
            raise Rejected("bad_field", f"no audio among {', '.join(sorted(fields))}")
        samples, rate = (
            np.asarray(fields[key]),
            getattr(features[key], "sample_rate", None) or 16_000,
        )
        samples = samples if samples.ndim == 1 else samples.mean(axis=-1)
        if not np.issubdtype(samples.dtype, np.floating) or np.abs(samples).max(initial=0) > 1.5:
            samples = samples / 32768.0  # the audio feature gives int16's range, whatever its type
        return self._entry(number, fields, (samples.astype(np.float32), rate))


class HuggingFace(_Table):
    """NAME[/CONFIG][:SPLIT] or FOLDER[:SPLIT] of Hugging Face datasets; the CONFIG is what follows the second slash of NAME."""

    def __init__(self, spec: str, lang: str):
        path, _, split = spec.partition(":")
        self.split, self.lang, self.name = split or "train", lang, f"hf:{spec}"
        parts = path.split("/")
        is_named = not os.path.isdir(path) and len(parts) > 2
        self.path, self.config = (
            ("/".join(parts[:2]), "/".join(parts[2:])) if is_named else (path, None)
        )
        self._source = None

    def __getstate__(self):
        return {**self.__dict__, "_source": None}

    def _open(self):
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
                    f"{self.name}: no audio among {', '.join(source.features)}; one of {', '.join(_AUDIO)} is expected"
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
        sound = fields.pop(self.key)
        if sound["bytes"] is None and not os.path.isfile(sound["path"] or ""):
            raise Rejected("missing_file", f"{sound['path']}: no such audio file")
        return self._entry(
            number, fields, sound["bytes"] or pathlib.Path(sound["path"]).read_bytes()
        )


def open_source(spec: str, data_dir: str | None = None, lang: str = "") -> CorpusSource:
    """jsonl:FILE, librispeech:FOLDER, tfds:NAME/CONFIG[:SPLIT] or hf:NAME/CONFIG[:SPLIT].

    Raises:
        UserError: no such source.
    """
    kind, _, rest = spec.partition(":")
    if not rest or kind not in ("jsonl", "librispeech", "tfds", "hf"):
        raise UserError(
            f"source {spec!r} is none of jsonl:FILE, librispeech:FOLDER, tfds:NAME/CONFIG[:SPLIT], hf:NAME[:SPLIT]"
        )
    if kind == "tfds":
        return TensorFlowDatasets(rest, data_dir, lang)
    if kind == "hf":
        return HuggingFace(rest, lang)
    return (
        JsonLines(os.path.expanduser(rest))
        if kind == "jsonl"
        else LibriSpeech(os.path.expanduser(rest))
    )
