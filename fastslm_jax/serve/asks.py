"""Request bodies, multipart forms and JSON with audio → `Ask`."""

import base64
import binascii
import io
import os
import pathlib
from typing import Annotated, Any, BinaryIO, Literal

import langcodes
import numpy as np
import pydantic

from fastslm_jax import audio, audio_files, schema
from fastslm_jax.audio import AudioError
from fastslm_jax.data.tasks import TASKS, with_context
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.serve.limits import ApiError, Limits
from fastslm_jax.serve.worker import Ask

MAX_TEXT = 100_000  # characters of a prompt
CONTEXT = "The transcript so far ends with:"  # as in `long_form`

Task = Literal[tuple(TASKS)]
Text = Annotated[str, pydantic.Field(max_length=MAX_TEXT)]
Temperature = Annotated[float, pydantic.Field(ge=0, le=2)]
Zero = Annotated[float, pydantic.Field(ge=0, le=0)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
Tokens = Annotated[int, pydantic.Field(ge=1, le=1_000_000)]


def _check_language(code: str) -> str:
    if not langcodes.tag_is_valid(code):
        raise ValueError("must be a language code such as en or ko")
    return code


class AudioFields(schema.Schema, strict=False, extra="forbid"):
    """Fields of a transcription's or translation's form, besides the file.

    `task`, `instruction`, `context`, `seed` and `max_tokens` are additions, the others are
    OpenAI's.
    """

    model: str | None = None
    task: Task = "asr"
    instruction: Text | None = None
    context: Text = ""
    prompt: Text | None = None
    language: Annotated[str, pydantic.AfterValidator(_check_language)] | None = None
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    stream: bool = False
    temperature: Temperature = 0.0
    seed: Seed = 0
    max_tokens: Tokens | None = None
    timestamp_granularities: list[Literal["segment"]] | None = None
    chunking_strategy: Literal["auto"] | None = None  # it always is

    def ask(self, samples: np.ndarray) -> Ask:
        instruction = with_context(self.task, self.instruction, self.context.strip())
        if self.prompt:  # the text before the audio, as OpenAI defines it
            base = instruction or TASKS[self.task].instruction
            instruction = f"{base}\n{CONTEXT} {self.prompt}"
        sampling = SamplingParams(self.temperature, seed=self.seed)
        return Ask(samples, self.task, instruction, sampling, self.max_tokens, self.stream)


class TextPart(schema.Schema):
    type: Literal["text"]
    text: Text


class InputAudio(schema.Schema):
    data: str
    format: Literal["wav", "mp3", "flac", "ogg"] = "wav"


class AudioPart(schema.Schema):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | AudioPart, pydantic.Field(discriminator="type")]


class Message(schema.Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: list[Part]  # or a text

    @pydantic.field_validator("content", mode="before")
    @classmethod
    def _wrap_text(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart)).strip()

    @property
    def audio(self) -> list[InputAudio]:
        return [part.input_audio for part in self.content if isinstance(part, AudioPart)]


class StreamOptions(schema.Schema):
    include_usage: bool = False


class ChatFields(schema.Schema, extra="forbid"):
    """The JSON of a chat completion. Fields that the model has no use for have one value."""

    model: str | None = None
    messages: Annotated[list[Message], pydantic.Field(min_length=1)]
    task: Task = "sqqa"
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Temperature = 0.0
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: Literal[1] = 1
    frequency_penalty: Zero = 0
    presence_penalty: Zero = 0
    modalities: list[Literal["text"]] | None = None
    logprobs: Literal[False] = False
    store: Literal[False] = False
    user: str | None = None
    metadata: dict[str, Any] | None = None

    def ask(self, limits: Limits) -> Ask:
        """The ask of a single turn; decodes its audio."""
        turns = [m for m in self.messages if m.role not in ("system", "developer")]
        if len(turns) != 1 or turns[0].role != "user":
            raise ApiError(
                400,
                "messages: give one user message (and system messages); the model is trained on "
                "single turns",
                "messages",
            )
        recordings = [audio for message in self.messages for audio in message.audio]
        if len(recordings) > 1:
            raise ApiError(400, "messages: give one input_audio; join recordings first", "messages")
        instruction = "\n".join(message.text for message in self.messages if message.text) or None
        if not recordings and instruction is None:
            raise ApiError(400, "messages: contain neither text nor audio", "messages")
        samples = decode_base64(recordings[0], limits) if recordings else None
        sampling = SamplingParams(self.temperature, top_p=self.top_p, seed=self.seed)
        tokens = self.max_completion_tokens or self.max_tokens
        return Ask(samples, self.task, instruction, sampling, tokens, self.stream)


def decode_base64(given: InputAudio, limits: Limits) -> np.ndarray:
    """The samples of an `input_audio` part."""
    try:
        data = base64.b64decode(given.data, validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"input_audio.data: not base64 ({error})", "messages") from None
    return decode(io.BytesIO(data), "input_audio", limits, "messages")


def decode_upload(file: BinaryIO, name: str, limits: Limits) -> np.ndarray:
    """Decodes a temporary file; a reader of its own, because PyAV writes to what is writable."""
    with open(os.dup(file.fileno()), "rb") as reader:
        return decode(reader, name, limits)


def decode(file: BinaryIO, name: str, limits: Limits, param: str = "file") -> np.ndarray:
    """Decodes an open file.

    Returns:
        int16 [n] at 16 kHz.

    Raises:
        ApiError: it is not audio (400), or too long (413).
    """
    blocks, count = [], 0
    try:
        for block in audio.stream(audio_files.read_blocks(file)):
            blocks.append(block)
            count += len(block)
            if count > 60 * limits.max_minutes * audio.SAMPLE_RATE:
                raise ApiError(
                    413,
                    f"{name}: more than {limits.max_minutes:g} minutes of audio, the limit of this "
                    "server",
                    param,
                    "audio_too_long",
                )
    except AudioError as error:
        raise ApiError(400, f"{name}: {error}", param, "invalid_audio") from None
    return np.concatenate(blocks)


def display_name(filename: str | None) -> str:
    """A client's file name for messages: without folders and control characters."""
    name = pathlib.PurePosixPath((filename or "").replace("\\", "/")).name
    return "".join(c for c in name if c.isprintable())[:80] or "file"
