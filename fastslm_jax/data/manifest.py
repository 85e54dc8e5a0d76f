"""Manifests: JSON lines that say where audio lies and what is said in it, read into an index that plans need no audio for."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data.prompts import TASKS
from fastslm_jax.errors import UserError


class ManifestError(UserError):
    """A manifest line that cannot be used: names file, line and reason."""


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One line: `seconds` of audio from `offset` on, the task's instruction (None: the default one) and its answer."""

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

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz."""
        return round(self.seconds * SAMPLE_RATE)


_REQUIRED = ("audio_filepath", "duration", "text")


def _seconds(value, name: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ManifestError(f"{where}: {name} {value!r} is not a number of seconds") from None


def _utterance(line: str, root: pathlib.Path, where: str) -> Utterance:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(fields, dict):
        raise ManifestError(f"{where}: not a JSON object")
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        raise ManifestError(f"{where}: no {missing[0]!r}; a line has at least {', '.join(_REQUIRED)}")
    for key in ("audio_filepath", "text", "answer", "prompt", "lang"):
        if not isinstance(fields.get(key, ""), str) and not (key == "prompt" and fields[key] is None):
            raise ManifestError(f"{where}: {key} {fields[key]!r} is not text")
    path = (root / fields["audio_filepath"]).resolve()
    if not path.is_relative_to(root):
        raise ManifestError(f"{where}: {fields['audio_filepath']} lies outside the manifest's folder {root}")
    task, answer = fields.get("task", "asr"), fields.get("answer", fields["text"])
    if task not in TASKS:
        raise ManifestError(f"{where}: task {task!r} is not one of {', '.join(TASKS)}")
    seconds, offset = _seconds(fields["duration"], "duration", where), _seconds(fields.get("offset") or 0.0, "offset", where)
    if not (0 < seconds < math.inf and 0 <= offset < math.inf):
        raise ManifestError(f"{where}: duration {seconds} or offset {offset} is not possible")
    if not answer.strip():
        raise ManifestError(f"{where}: the answer is empty")
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
    )


def read_manifest(path: str | os.PathLike, tasks: Sequence[str] = ()) -> list[Utterance]:
    """Lines of a manifest, of the named tasks only (all by default). Audio paths are relative to the manifest's folder and may
    not leave it.

    Raises:
        ManifestError: the first line that cannot be used, a missing audio file, or nothing left.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest")
    root = path.parent.resolve()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # and at nothing else: JSON text may hold other line separators
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    utterances = [_utterance(line, root, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    utterances = [utterance for utterance in utterances if not tasks or utterance.task in tasks]
    if not utterances:
        raise ManifestError(f"{path}: no utterances" + (f" of task {', '.join(tasks)}" if tasks else ""))
    for file in {utterance.path for utterance in utterances}:
        if not os.path.isfile(file):
            raise ManifestError(f"{path}: audio file {file} is missing")
    return utterances
