"""Conversion of one shard of an import: entries of a source → records and index lines.

A shard is a pure function of (source, settings, shard number): any process can write it, in this
program or in a Beam pipeline, and always writes the same bytes.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator

from fastslm_jax.audio import SAMPLE_RATE, WindowSpec
from fastslm_jax.data import prompts
from fastslm_jax.data.ingest import sources, store
from fastslm_jax.data.ingest.decoding import Rejected
from fastslm_jax.data.manifest import Utterance, within
from fastslm_jax.errors import UserError
from fastslm_jax.weights import pretrained

VERSION = 1  # of the conversion: increase it when the same source gives different shards


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides the source that determines the shards.

    Attributes:
        shard_clips: entries of the source per shard.
        window_seconds: length of the encoder's window.
        tokenizer: folder or name of the language model ("": do not count tokens).
        duration_tolerance: seconds by which a file may differ from its duration.
        min_chars_per_second: clips with less text are rejected.
        max_chars_per_second: clips with more text are rejected.
    """

    shard_clips: int = 512
    window_seconds: float = 30.0
    tokenizer: str = ""
    duration_tolerance: float = 0.1
    min_chars_per_second: float = 0.2
    max_chars_per_second: float = 40.0

    @property
    def window(self) -> WindowSpec:
        """The encoder's window, for the window counts in the index."""
        return WindowSpec(frames=round(100 * self.window_seconds))

    def prompt_tokenizer(self) -> prompts.PromptTokenizer | None:
        """The tokenizer that counts tokens; loaded once per process."""
        return _load_prompt_tokenizer(self.tokenizer) if self.tokenizer else None


@functools.cache
def _load_prompt_tokenizer(name: str) -> prompts.PromptTokenizer:
    folder = pretrained.resolve(name, weights=False)
    # The chat template is not used in counting, so tokenizers without one do, too.
    return prompts.PromptTokenizer(prompts.load_tokenizer(folder, chat_template="chatml"))


@dataclasses.dataclass(frozen=True)
class ImportJob:
    """Everything that a process needs to write a shard."""

    source: sources.CorpusSource
    settings: Settings
    out: pathlib.Path

    def num_shards(self) -> int:
        """Number of shards of the whole import."""
        return -(-len(self.source) // self.settings.shard_clips)

    def shard(self, number: int) -> pathlib.Path:
        """Path of a shard."""
        return self.out / f"shard-{number:05d}.array_record"

    def part(self, number: int) -> pathlib.Path:
        """Path of a shard's index lines and rejections; it exists when the shard is finished."""
        return self.out / "parts" / f"{number:05d}.json"


def _check_text(u: Utterance, seconds: float, settings: Settings) -> None:
    if u.no_speech:
        return
    if not u.answer.strip() or (u.task == "asr" and not u.text.strip()):
        raise Rejected("empty_text", "the text is empty")
    rate = len(u.text.strip()) / seconds
    if (
        u.text.strip()
        and not settings.min_chars_per_second <= rate <= settings.max_chars_per_second
    ):
        raise Rejected(
            "text_rate",
            f"{rate:.2f} characters per second; allowed: {settings.min_chars_per_second} to "
            f"{settings.max_chars_per_second}",
        )


def encode_clip(entry: sources.Entry, settings: Settings) -> tuple[dict, bytes]:
    """Converts an entry of a source.

    Returns:
        The clip's index line, without its shard and record number, and its record.

    Raises:
        Rejected: the clip cannot be used.
    """
    u, samples = entry.utterance, entry.samples(settings.duration_tolerance)
    seconds = len(samples) / SAMPLE_RATE
    _check_text(u, seconds, settings)
    tokenizer = settings.prompt_tokenizer()
    line = {
        "id": u.id,
        "offset": u.offset,
        "seconds": seconds,
        "windows": settings.window.count(len(samples)),
        "text_tokens": tokenizer.answer_length(u.answer) if tokenizer else None,
        "joined_tokens": tokenizer.answer_length(prompts.joined(u.answer)) if tokenizer else None,
        "task": u.task,
        "lang": u.lang,
        "speaker": u.speaker,
        "recording": u.recording,
        "text": u.text,
        "prompt": u.instruction,
        "answer": u.answer,
        "segments": [dataclasses.asdict(segment) for segment in within(u.segments, seconds)],
        "no_speech": u.no_speech,
    }
    if u.context:
        line["context"] = u.context
    return line, store.encode({key: line[key] for key in ("id", "task", "text", "answer")}, samples)


def make_shard(job: ImportJob, number: int) -> None:
    """Writes a shard, then its part. Without usable entries, only the part is written."""
    lines, rejected, shard = [], [], job.shard(number)

    def records() -> Iterator[bytes]:
        first = number * job.settings.shard_clips
        for at in range(first, min(first + job.settings.shard_clips, len(job.source))):
            known = {"at": at, "id": ""}
            try:
                entry = job.source.entry(at)
                known |= {"id": entry.utterance.id, "audio": os.path.basename(entry.utterance.path)}
                line, record = encode_clip(entry, job.settings)
            except Rejected as rejection:
                rejected.append(known | {"kind": rejection.kind, "reason": rejection.reason})
                continue
            except UserError:
                raise
            except Exception as error:  # for example, no read permission
                reason = f"{type(error).__name__}: {error}"
                rejected.append(known | {"kind": "unreadable", "reason": reason})
                continue
            lines.append({"at": at, **line, "shard": shard.name, "record": len(lines)})
            yield record

    store.write_shard(shard, records())
    with store.atomic_writer(job.part(number)) as file:
        file.write(json.dumps({"clips": lines, "rejected": rejected}, ensure_ascii=False))
