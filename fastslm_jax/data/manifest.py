"""Manifests and imported folders, read into an index from which rows are planned without audio.

A manifest is a JSON Lines file of audio paths and transcripts. An imported folder is the output of
`data.ingest`. docs/data.md describes the fields.
"""

import codecs
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pydantic
from absl import logging

from fastslm_jax import audio, schema
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import fields
from fastslm_jax.data.ingest import decoding, store
from fastslm_jax.data.tasks import with_context
from fastslm_jax.errors import UserError

SEGMENT_TOLERANCE = 0.1  # seconds by which segments may end after their clip
MAX_UNCOVERED_SECONDS = 5.0  # after the last segment of a clip, without a warning
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
        context: phrases that may occur in the clip, or a text about it, for the prompt.
        no_speech: whether the clip is known to contain no speech; its text and answer are empty.
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
    context: str = ""
    no_speech: bool = False
    record: int = -1
    begin: float = 0.0
    text_tokens: int | None = None
    joined_tokens: int | None = None

    @property
    def prompt(self) -> str | None:
        """The instruction with the context; None: the task's default instruction."""
        return with_context(self.task, self.instruction, self.context)

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz."""
        return round(self.seconds * SAMPLE_RATE)


class _Line(schema.Schema):
    """A line of a manifest."""

    audio_filepath: fields.Text
    duration: fields.Length
    text: fields.Text
    offset: fields.Seconds | None = None
    task: fields.Task = "asr"
    prompt: fields.Text | None = None
    answer: fields.Text | None = None
    lang: fields.Language = "en"
    speaker: fields.Name = ""
    recording: fields.Name | None = None
    id: fields.Name | None = None
    segments: fields.Segments = ()
    context: fields.Context = ""
    no_speech: bool = False


def parse_json(line: str | bytes, where: str) -> dict:
    """Parses a line of a manifest.

    Raises:
        ManifestError: the line is not a JSON object.
    """
    try:
        value = schema.parse_json(line)
    except ValueError as error:
        raise ManifestError(where, str(error), "broken_json") from None
    if not isinstance(value, dict):
        raise ManifestError(where, "not a JSON object", "broken_json")
    return value


def parse_utterance(line: dict, root: pathlib.Path, where: str) -> Utterance:
    """Checks the fields of a manifest line and converts them to an utterance.

    Args:
        line: the line's JSON object.
        root: the manifest's folder.
        where: file and line, for error messages and as the default id.

    Raises:
        ManifestError: a field is missing or invalid.
    """
    try:
        line = _Line.model_validate(line)
    except pydantic.ValidationError as error:
        raise ManifestError(where, schema.describe(error)) from None
    try:
        path = (root / line.audio_filepath).resolve()
    except (OSError, RuntimeError) as error:  # for example, a loop of symbolic links
        raise ManifestError(where, f"audio_filepath: {error}") from None
    if not path.is_relative_to(root):
        raise ManifestError(
            where,
            f"{line.audio_filepath} is outside the manifest's folder {root}",
            "outside_root",
        )
    answer = line.text if line.answer is None else line.answer
    if line.no_speech and (line.text or answer):
        raise ManifestError(where, "no_speech is true, but text or answer is not empty")
    if not line.no_speech and not answer.strip():
        raise ManifestError(
            where, "the answer is empty; a clip without speech needs no_speech: true", "empty_text"
        )
    return Utterance(
        path=str(path),
        offset=line.offset or 0.0,
        seconds=line.duration,
        task=line.task,
        instruction=line.prompt,
        answer=answer,
        text=line.text,
        lang=line.lang,
        speaker=line.speaker,
        recording=line.audio_filepath if line.recording is None else line.recording,
        id=where if line.id is None else line.id,
        segments=_segments(line, where),
        has_offset=line.offset is not None,
        context=line.context,
        no_speech=line.no_speech,
    )


def _segments(line: _Line, where: str) -> tuple[Segment, ...]:
    times = [time for segment in line.segments for time in (segment.start, segment.end)]
    if times != sorted(times):
        raise ManifestError(where, "segments overlap or are out of order")
    if times and times[-1] > line.duration + SEGMENT_TOLERANCE:
        raise ManifestError(
            where, f"segments end at {times[-1]:g} s, the clip ends at {line.duration:g} s"
        )
    return within((Segment(s.start, s.end, s.text) for s in line.segments), line.duration)


def within(segments: Iterable[Segment], seconds: float) -> tuple[Segment, ...]:
    """The segments, cut at the end of a clip of this length."""
    return tuple(
        Segment(min(segment.start, seconds), min(segment.end, seconds), segment.text)
        for segment in segments
    )


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def lack_text(text: str, segments: Sequence[Segment]) -> bool:
    """Whether a clip's segments do not contain its transcript; case and punctuation may differ."""
    return _letters(text) != _letters("".join(segment.text for segment in segments))


def do_not_cover(text: str, seconds: float, segments: Sequence[Segment]) -> bool:
    """Whether a clip has segments that lack text, or that end long before the clip."""
    return bool(segments) and (
        seconds - segments[-1].end > MAX_UNCOVERED_SECONDS or lack_text(text, segments)
    )


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[int, int, bytes]]:
    """Yields (line number from 1, byte offset, content) of the lines that are not blank.

    Lines end with LF, CRLF or CR; no other character does, since JSON strings may contain U+2028. A
    byte order mark is skipped.
    """
    number = start = 0
    with open(path, "rb") as file:
        for chunk in file:  # up to LF
            for line in chunk.splitlines(keepends=True):
                number, mark = number + 1, len(codecs.BOM_UTF8)
                skipped = mark if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                if content := line[skipped:].strip():
                    yield number, start + skipped, content
                start += len(line)


def _read_lines(path: pathlib.Path) -> list[Utterance]:
    root, utterances = path.parent.resolve(), []
    first_use: dict[str, int] = {}  # id → line
    for number, _, content in numbered_lines(path):
        where = f"{path}:{number}"
        utterance = parse_utterance(parse_json(content, where), root, where)
        before = first_use.setdefault(utterance.id, number)
        if before != number:
            raise ManifestError(
                where,
                f"the id {utterance.id!r} is already used in line {before}; ids must differ",
                "duplicate_id",
            )
        utterances.append(utterance)
    return utterances


def _read_folder(path: pathlib.Path) -> list[Utterance]:
    return [
        Utterance(
            path=str(path / line.shard),
            offset=line.offset,
            seconds=line.seconds,
            task=line.task,
            instruction=line.prompt,
            answer=line.answer,
            text=line.text,
            lang=line.lang,
            speaker=line.speaker,
            recording=line.recording,
            id=line.id,
            segments=tuple(Segment(s.start, s.end, s.text) for s in line.segments),
            context=line.context,
            no_speech=line.no_speech,
            record=line.record,
            begin=line.offset,
            text_tokens=line.text_tokens,
            joined_tokens=line.joined_tokens,
        )
        for line in store.index_lines(path)
    ]


def read_manifest(path: str | os.PathLike, tasks: Sequence[str] = ()) -> list[Utterance]:
    """Reads the utterances of a manifest or of an imported folder.

    Audio paths in a manifest are relative to its folder and must stay inside it. Clips whose
    segments do not cover them are counted in a warning.

    Args:
        path: a manifest or an imported folder.
        tasks: the tasks to read (empty: all).

    Raises:
        ManifestError: a line is invalid, two lines have one id, an audio file is missing, or no
            utterances are left.
        StoreError: the folder has no finished import, or is damaged.
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
    uncovered = [u.id for u in utterances if do_not_cover(u.text, u.seconds, u.segments)]
    if uncovered:
        logging.warning(
            "%s: %d of %d clips have segments without all their text, or that end more than %g s "
            "before the clip (first: %s)",
            *(path, len(uncovered), len(utterances), MAX_UNCOVERED_SECONDS, uncovered[0]),
        )
    return utterances


def fingerprint(path: str | os.PathLike) -> str:
    """Changes when the content of a manifest, or of an imported folder, changes."""
    path = pathlib.Path(path)
    return store.checksum(path / store.DATASET if path.is_dir() else path)


def tokenizer_fingerprint(path: str | os.PathLike) -> str | None:
    """Fingerprint of the tokenizer that counted an imported folder's tokens, or None."""
    return store.description(path).get("tokenizer") if os.path.isdir(path) else None


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
