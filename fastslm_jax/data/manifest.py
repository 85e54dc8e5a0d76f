"""Manifests and imported folders, read into an index from which rows are planned without audio.

A manifest is a JSON Lines file of audio paths and transcripts. An imported folder is the output of
`data.ingest`. docs/data.md describes the fields.
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
from fastslm_jax.data.ingest import decoding, store
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError

_REQUIRED = ("audio_filepath", "duration", "text")
_TEXT_FIELDS = ("audio_filepath", "text", "answer", "prompt", "lang")
LENGTH_TOLERANCE = 0.1  # seconds by which a clip may differ from its duration


class ManifestError(UserError):
    """A manifest cannot be used. The message gives the file, the line and the reason.

    Attributes:
        reason: the reason, without the file and line.
        kind: the reason as one of `ingest.decoding.KINDS`.
    """

    def __init__(self, where: str | os.PathLike, reason: str, kind: str = "bad_field") -> None:
        super().__init__(f"{where}: {reason}")
        self.reason, self.kind = reason, kind


@dataclasses.dataclass(frozen=True)
class Segment:
    """A timed part of a transcript; `start` and `end` are seconds in the clip."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One clip of a recording, with its task and answer.

    Attributes:
        path: an audio file, or a shard of an imported folder.
        offset: start of the clip in its recording, in seconds.
        seconds: length of the clip.
        task: a key of TASKS.
        instruction: None: the task's default instruction.
        answer: the text that the model learns to generate.
        text: the transcript.
        lang: language code.
        speaker: speaker name, for grouping.
        recording: recording name, for grouping.
        id: unique name of the clip.
        segments: timed transcript, if known.
        has_offset: whether the clip is a part of its file; otherwise it is the whole file.
        record: record number in the shard (-1: `path` is an audio file).
        begin: start of the stored audio in the recording, in seconds.
        text_tokens: tokens of the answer, if the import counted them.
        joined_tokens: tokens of the answer after a space, if the import counted them.
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
    has_offset: bool = False
    record: int = -1
    begin: float = 0.0
    text_tokens: int | None = None
    joined_tokens: int | None = None

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz."""
        return round(self.seconds * SAMPLE_RATE)


def _parse_seconds(value: object, name: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ManifestError(where, f"{name} {value!r} is not a number of seconds") from None


def _parse_segments(values: list[dict] | None, where: str) -> tuple[Segment, ...]:
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
    """Parses a line of a manifest.

    Raises:
        ManifestError: the line is not a JSON object.
    """
    try:
        fields = json.loads(line)
        if "\\u" in line:  # an unpaired surrogate can be read, but not written
            json.dumps(fields, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ManifestError(where, f"not JSON ({error.msg})", "broken_json") from None
    except (UnicodeEncodeError, RecursionError) as error:
        raise ManifestError(
            where, f"JSON that cannot be written back ({type(error).__name__})", "broken_json"
        ) from None
    if not isinstance(fields, dict):
        raise ManifestError(where, "not a JSON object", "broken_json")
    return fields


def parse_utterance(fields: dict, root: pathlib.Path, where: str) -> Utterance:
    """Checks the fields of a manifest line and converts them to an utterance.

    Args:
        fields: the line's JSON object.
        root: the manifest's folder.
        where: file and line, for error messages and as the default id.

    Raises:
        ManifestError: a field is missing or invalid.
    """
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        raise ManifestError(where, f"{missing[0]!r} is missing; required: {', '.join(_REQUIRED)}")
    for key in _TEXT_FIELDS:
        is_default = key == "prompt" and fields.get(key) is None
        if not is_default and not isinstance(fields.get(key, ""), str):
            raise ManifestError(where, f"{key} {fields[key]!r} is not text")
    path = (root / fields["audio_filepath"]).resolve()
    if not path.is_relative_to(root):
        raise ManifestError(
            where,
            f"{fields['audio_filepath']} is outside the manifest's folder {root}",
            "outside_root",
        )
    task, answer = fields.get("task", "asr"), fields.get("answer", fields["text"])
    if task not in TASKS:
        raise ManifestError(where, f"task {task!r} is not one of {', '.join(TASKS)}")
    seconds = _parse_seconds(fields["duration"], "duration", where)
    offset = _parse_seconds(fields.get("offset") or 0.0, "offset", where)
    if not (0 < seconds < math.inf and 0 <= offset < math.inf):
        raise ManifestError(where, f"duration {seconds} or offset {offset} is out of range")
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
        segments=_parse_segments(fields.get("segments"), where),
        has_offset=fields.get("offset") is not None,
    )


def _read_lines(path: pathlib.Path) -> list[Utterance]:
    root = path.parent.resolve()
    try:
        # Not splitlines(): JSON strings may contain other line separators, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
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
    """Reads the utterances of a manifest or of an imported folder.

    Audio paths in a manifest are relative to its folder and must stay inside it.

    Args:
        path: a manifest or an imported folder.
        tasks: the tasks to read (empty: all).

    Raises:
        ManifestError: a line is invalid, an audio file is missing, or no utterances are left.
        StoreError: the folder has no finished import.
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


def tokenizer_fingerprint(path: str | os.PathLike) -> str | None:
    """Fingerprint of the tokenizer that counted an imported folder's tokens, or None."""
    return store.description(path)["tokenizer"] if os.path.isdir(path) else None


def read_clip(utterance: Utterance) -> np.ndarray:
    """Reads an utterance's audio: int16 [num_samples] at 16 kHz.

    Raises:
        AudioError: the audio is unreadable or silent, or its length differs from the manifest by
            more than LENGTH_TOLERANCE.
    """
    if utterance.record >= 0:
        start = round((utterance.offset - utterance.begin) * SAMPLE_RATE)
        _, samples = store.read_record(utterance.path, utterance.record)
        clip = samples[start : start + utterance.num_samples]
        if utterance.num_samples - len(clip) > LENGTH_TOLERANCE * SAMPLE_RATE:
            raise audio.AudioError(
                f"{utterance.path}: record {utterance.record} is {len(samples) / SAMPLE_RATE:.2f} "
                f"s long, the index says {utterance.seconds:.2f} s"
            )
    else:
        try:
            clip = decoding.decode(
                utterance.path,
                utterance.offset,
                utterance.seconds,
                is_whole=not utterance.has_offset,
                tolerance=LENGTH_TOLERANCE,
            )
        except decoding.Rejected as rejected:
            raise audio.AudioError(f"{utterance.path}: {rejected}", rejected.kind) from None
    clip = clip[: utterance.num_samples]
    return np.pad(clip, (0, utterance.num_samples - len(clip)))
