"""Manifests and imported folders, read into an index that plans need no audio for.

A manifest has JSON lines that say where audio lies and what is said in it; a folder is what `data.ingest` made of one.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from fastslm_jax import audio
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data.ingest import store
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError


class ManifestError(UserError):
    """A manifest line that cannot be used: names file, line and reason. `kind` is one word for the reason."""

    def __init__(self, where: str | os.PathLike, reason: str, kind: str = "bad_field"):
        super().__init__(f"{where}: {reason}")
        self.reason, self.kind = reason, kind


@dataclasses.dataclass(frozen=True)
class Segment:
    """What is said from `start` to `end`, in seconds of the clip."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One clip: `seconds` of its recording from `offset` on, the task's instruction (None: the default one) and its answer.

    `path` is an audio file, or a shard of which it is the record number `record`; that audio begins `begin` seconds into the
    recording. Token counts of the answer, alone and after a space, are those of the tokenizer that an import named.
    """

    path: str
    offset: float
    seconds: float
    task: str
    instruction: str | None
    answer: str
    text: str
    lang: str
    speaker: str
    recording: str
    id: str
    segments: tuple[Segment, ...] = ()
    record: int = -1
    begin: float = 0.0
    text_tokens: int | None = None
    joined_tokens: int | None = None

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz."""
        return round(self.seconds * SAMPLE_RATE)


_REQUIRED = ("audio_filepath", "duration", "text")


def _seconds(value, name: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ManifestError(where, f"{name} {value!r} is not a number of seconds") from None


def _segments(values, where: str) -> tuple[Segment, ...]:
    try:
        segments = tuple(
            Segment(float(value["start"]), float(value["end"]), str(value["text"]))
            for value in values or ()
        )
    except (TypeError, ValueError, KeyError):
        raise ManifestError(where, "segments is not a list of {start, end, text}") from None
    times = [time for segment in segments for time in (segment.start, segment.end)]
    if times != sorted(times) or any(time < 0 for time in times):
        raise ManifestError(where, "segments overlap or are out of order")
    return segments


def parse_json(line: str, where: str) -> dict:
    """The object of a line.

    Raises:
        ManifestError: it is not one.
    """
    try:
        fields = json.loads(line)
        if "\\u" in line:  # half of a surrogate pair is no text
            json.dumps(fields, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ManifestError(where, f"not JSON ({error.msg})", "broken_json") from None
    except (UnicodeEncodeError, RecursionError) as error:
        raise ManifestError(
            where, f"not JSON that can be written again ({type(error).__name__})", "broken_json"
        ) from None
    if not isinstance(fields, dict):
        raise ManifestError(where, "not a JSON object", "broken_json")
    return fields


def parse_utterance(fields: dict, root: pathlib.Path, where: str) -> Utterance:
    """The utterance of a line's fields; `root` is the manifest's folder.

    Raises:
        ManifestError: it cannot be used.
    """
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        raise ManifestError(where, f"no {missing[0]!r}; a line has at least {', '.join(_REQUIRED)}")
    for key in ("audio_filepath", "text", "answer", "prompt", "lang"):
        if not isinstance(fields.get(key, ""), str) and not (
            key == "prompt" and fields[key] is None
        ):
            raise ManifestError(where, f"{key} {fields[key]!r} is not text")
    path = (root / fields["audio_filepath"]).resolve()
    if not path.is_relative_to(root):
        raise ManifestError(
            where,
            f"{fields['audio_filepath']} lies outside the manifest's folder {root}",
            "outside_root",
        )
    task, answer = fields.get("task", "asr"), fields.get("answer", fields["text"])
    if task not in TASKS:
        raise ManifestError(where, f"task {task!r} is not one of {', '.join(TASKS)}")
    seconds, offset = (
        _seconds(fields["duration"], "duration", where),
        _seconds(fields.get("offset") or 0.0, "offset", where),
    )
    if not (0 < seconds < math.inf and 0 <= offset < math.inf):
        raise ManifestError(where, f"duration {seconds} or offset {offset} is not possible")
    if not answer.strip():
        raise ManifestError(where, "the answer is empty", "empty_text")
    return Utterance(
        path=str(path),
        offset=offset,
        seconds=seconds,
        task=task,
        instruction=fields.get("prompt"),
        answer=answer,
        text=fields["text"],
        lang=fields.get("lang", "en"),
        speaker=str(fields.get("speaker", "")),
        recording=str(fields.get("recording", fields["audio_filepath"])),
        id=str(fields.get("id", where)),
        segments=_segments(fields.get("segments"), where),
    )


def _read_lines(path: pathlib.Path) -> list[Utterance]:
    root = path.parent.resolve()
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # and at nothing else: JSON text may hold other line separators
    except UnicodeDecodeError as error:
        raise ManifestError(path, f"not UTF-8 ({error.reason} at byte {error.start})") from None
    utterances = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            utterances.append(parse_utterance(parse_json(line, where), root, where))
    return utterances


def _read_folder(path: pathlib.Path) -> list[Utterance]:
    shards = {name: str(path / name) for name in store.description(path)["shards"]}
    return [
        Utterance(
            path=shards[line["shard"]],
            offset=line["offset"],
            seconds=line["seconds"],
            task=line["task"],
            instruction=line["prompt"],
            answer=line["answer"],
            text=line["text"],
            lang=line["lang"],
            speaker=line["speaker"],
            recording=line["recording"],
            id=line["id"],
            segments=tuple(Segment(**segment) for segment in line["segments"]),
            record=line["record"],
            begin=line["offset"],
            text_tokens=line["text_tokens"],
            joined_tokens=line["joined_tokens"],
        )
        for line in store.index_lines(path)
    ]


def read_manifest(path: str | os.PathLike, tasks: Sequence[str] = ()) -> list[Utterance]:
    """Utterances of a manifest or of an imported folder, of the named tasks only (all by default). Audio paths of a manifest are
    relative to its folder and may not leave it.

    Raises:
        ManifestError: the first line that cannot be used, a missing audio file, or nothing left.
        StoreError: a folder that holds no finished import.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ManifestError(path, "no such manifest")
    utterances = _read_folder(path) if path.is_dir() else _read_lines(path)
    utterances = [utterance for utterance in utterances if not tasks or utterance.task in tasks]
    if not utterances:
        raise ManifestError(
            path, "no utterances" + (f" of task {', '.join(tasks)}" if tasks else "")
        )
    for file in {utterance.path for utterance in utterances}:
        if not os.path.isfile(file):
            raise ManifestError(path, f"audio file {file} is missing")
    return utterances


def counted_by(path: str | os.PathLike) -> str | None:
    """Fingerprint of the tokenizer whose counts an imported folder holds; None for manifests and folders without counts."""
    return store.description(path)["tokenizer"] if os.path.isdir(path) else None


def read_clip(utterance: Utterance) -> np.ndarray:
    """The utterance's int16 samples at 16 kHz, exactly `num_samples` of them.

    Raises:
        AudioError: the audio is unreadable, or not as long as the manifest says (10 ms of difference are mended).
    """
    start = round((utterance.offset - utterance.begin) * SAMPLE_RATE)
    if utterance.record >= 0:
        clip = store.read_record(utterance.path, utterance.record)[1][
            start : start + utterance.num_samples
        ]
    else:
        clip = audio.read_audio(utterance.path, utterance.offset, utterance.seconds)
    missing = utterance.num_samples - len(clip)
    if abs(missing) > SAMPLE_RATE // 100:
        held = len(clip) / SAMPLE_RATE
        raise audio.AudioError(
            f"{utterance.path}: holds {held:.2f} s, its manifest says {utterance.seconds:.2f} s"
        )
    return np.pad(clip[: utterance.num_samples], (0, max(0, missing)))
