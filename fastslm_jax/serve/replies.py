"""Responses: results → JSON, text, subtitles, and server-sent events."""

import dataclasses
import json
import math
import time
import uuid
from collections.abc import Iterator

from starlette.responses import JSONResponse, PlainTextResponse, Response

from fastslm_jax import transcribe
from fastslm_jax.inference.long_form import Result, TranscriptSegment
from fastslm_jax.serve.asks import AudioFields, ChatFields
from fastslm_jax.serve.worker import Progress

DONE = "data: [DONE]\n\n"


def event(fields: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def settled(result: Result) -> list[TranscriptSegment]:
    """The segments so far up to the first that is not done, that one included.

    Later ones may be done sooner, and one that is decoded again leaves a gap.
    """
    found, end = [], 0.0
    for segment in result.segments:
        if segment.start != end:
            break
        found.append(segment)
        if segment.stop_reason is None:
            break
        end = segment.end
    return found


@dataclasses.dataclass
class Growth:
    """Turns growing texts into deltas. Text that was sent is never taken back."""

    written: str = ""

    def delta(self, text: str) -> str:
        if not text.startswith(self.written):
            return ""
        new = text[len(self.written) :]
        self.written = text
        return new


def text_so_far(result: Result) -> str:
    """The text that will not change, except for a repetition that is cut at the end."""
    if result.stop_reason is not None:
        return result.text
    if not result.segments:  # no audio
        return result.text.rstrip("\ufffd")
    text = " ".join(segment.text for segment in settled(result) if segment.text)
    return text.rstrip("\ufffd")  # a character whose bytes are incomplete


# ------------------------------------------------------------------------------- transcriptions


def _segment(number: int, segment: TranscriptSegment) -> dict:
    return {
        "id": number,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "stop_reason": segment.stop_reason,
    }


def transcription(fields: AudioFields, result: Result) -> Response:
    """The response in the form that the client asked for."""
    kind = fields.response_format
    if kind == "text":
        return PlainTextResponse(f"{result.text}\n")
    if kind in ("srt", "vtt"):
        media = "text/vtt" if kind == "vtt" else "text/plain"
        return PlainTextResponse(
            transcribe.subtitles(result.segments, kind) + "\n", media_type=media
        )
    body = {
        "text": result.text,
        "usage": {"type": "duration", "seconds": math.ceil(result.seconds)},
        "stop_reason": result.stop_reason,
    }
    if kind == "verbose_json":
        body |= {
            "task": "translate" if fields.task == "ast" else "transcribe",
            "language": fields.language or "unknown",
            "duration": round(result.seconds, 3),
            "segments": [_segment(i, segment) for i, segment in enumerate(result.segments)],
        }
    return JSONResponse(body)


class TranscriptEvents:
    """The events of a streamed transcription.

    With response_format=verbose_json there is also one for each segment that is done.
    """

    def __init__(self, fields: AudioFields):
        self._with_segments = fields.response_format == "verbose_json"
        self._growth, self._segments = Growth(), 0

    def __call__(self, progress: Progress) -> Iterator[str]:
        result = progress.result
        if delta := self._growth.delta(text_so_far(result)):
            yield event({"type": "transcript.text.delta", "delta": delta})
        if self._with_segments:
            done = [segment for segment in settled(result) if segment.stop_reason is not None]
            for number, segment in list(enumerate(done))[self._segments :]:
                yield event(
                    _segment(number, segment)
                    | {"type": "transcript.text.segment", "id": str(number), "speaker": ""}
                )
            self._segments = len(done)
        if result.stop_reason is not None:
            done = {
                "type": "transcript.text.done",
                "text": result.text,
                "usage": _usage(progress, "input_tokens", "output_tokens", type="tokens"),
                "stop_reason": result.stop_reason,
            }
            if self._with_segments:  # for the page
                done["duration"] = round(result.seconds, 3)
                done["srt"] = transcribe.subtitles(result.segments, "srt") + "\n"
            yield event(done)
            yield DONE


def _usage(progress: Progress, prompt: str, answer: str, **more: str) -> dict:
    tokens = progress.prompt_tokens, progress.result.new_tokens
    return {prompt: tokens[0], answer: tokens[1], "total_tokens": sum(tokens), **more}


# ----------------------------------------------------------------------------- chat completions


class ChatEvents:
    """A chat completion, as a whole or as events."""

    def __init__(self, fields: ChatFields, model_name: str):
        self._include_usage = fields.stream_options.include_usage
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }
        self._growth, self._is_first = Growth(), True

    def whole(self, progress: Progress) -> Response:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": progress.result.text, "refusal": None},
            "finish_reason": _finish_reason(progress.result),
            "logprobs": None,
        }
        return JSONResponse(
            {
                **self._head,
                "object": "chat.completion",
                "choices": [choice],
                "usage": _usage(progress, "prompt_tokens", "completion_tokens"),
            }
        )

    def __call__(self, progress: Progress) -> Iterator[str]:
        if self._is_first:
            yield self._chunk({"role": "assistant", "content": ""})
            self._is_first = False
        if delta := self._growth.delta(text_so_far(progress.result)):
            yield self._chunk({"content": delta})
        if progress.result.stop_reason is not None:
            yield self._chunk({}, _finish_reason(progress.result))
            if self._include_usage:
                usage = _usage(progress, "prompt_tokens", "completion_tokens")
                yield event(self._fields([]) | {"usage": usage})
            yield DONE

    def _chunk(self, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event(self._fields([choice]))

    def _fields(self, choices: list[dict]) -> dict:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}


def _finish_reason(result: Result) -> str:
    return "length" if result.stop_reason == "budget" else "stop"
