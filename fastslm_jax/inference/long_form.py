"""Recordings of any length, in one context or in spans cut at silence; what ends in a loop is decoded again in pieces."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fastslm_jax import audio
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.inference.batching import CHUNK
from fastslm_jax.inference.generator import Answer, Generator, Request
from fastslm_jax.memory import CapacityError

TOKENS_PER_SECOND = (
    6.0  # speech has up to three words a second; an answer may take two tokens for each
)
SHORT_TASKS_PER_SECOND = 0.1  # summaries and answers grow more slowly
MIN_NEW_TOKENS = 64
SEARCH = (
    6 * audio.SAMPLE_RATE
)  # samples at a span's end where silence is looked for, at most half of it
SILENCE = (
    3 * audio.SAMPLE_RATE // 10
)  # samples whose loudness is compared: longer than a stop inside a word
SMALLEST_PIECE = 2.0  # seconds; what is shorter than two of these is not cut again


def budget(seconds: float, task: str | None = "asr") -> int:
    """The most new tokens of an answer: it grows with the recording, so that no transcript is cut."""
    if TASKS[task].is_splittable:
        return MIN_NEW_TOKENS + int(TOKENS_PER_SECOND * seconds)
    return MIN_NEW_TOKENS + int(
        min(TOKENS_PER_SECOND * seconds, 448 + SHORT_TASKS_PER_SECOND * seconds)
    )


@dataclasses.dataclass(frozen=True)
class LongFormRequest:
    """A recording (int16 at 16 kHz) with what to do with it.

    span: seconds of a span; None: the whole recording in one context.
    running_prompt: words of the transcript so far that the next span's prompt is given; spans then wait for each other.
    """

    samples: np.ndarray
    task: str = "asr"
    instruction: str | None = None
    span: float | None = None
    running_prompt: int = 0
    max_new_tokens: int | None = None

    @property
    def seconds(self) -> float:
        return len(self.samples) / audio.SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class TranscriptSegment:
    """What was said from `start` to `end`, in seconds: borders of spans, not of words."""

    start: float
    end: float
    text: str
    stop_reason: str


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer of a job, from all its spans.

    covered_seconds: audio that the model heard; all of it, but for less than one frame (10 ms) at the end.
    stop_reason: "loop" or "budget" if any span stopped so, else "eos".
    again: spans that ended in a loop and were decoded once more in pieces.
    """

    text: str
    segments: tuple[TranscriptSegment, ...]
    windows: int
    speech_tokens: int
    covered_seconds: float
    stop_reason: str
    new_tokens: int
    first_token_seconds: float
    again: int


def _quietest(samples: np.ndarray, low: int, high: int) -> int:
    """The middle of the quietest SILENCE samples between two places."""
    step = SILENCE // 12
    count = (high - low) // step
    if count < 24:
        return high
    energy = (
        np.square(samples[low : low + count * step].astype(np.float64))
        .reshape(count, -1)
        .sum(axis=1)
    )
    loudness = np.convolve(energy, np.ones(12), mode="valid")
    last = len(loudness) - 1 - int(np.argmin(loudness[::-1]))  # the latest of equals
    return low + last * step + SILENCE // 2


def cut(samples: np.ndarray, span: int, window: int) -> list[tuple[int, int]]:
    """Spans (start, stop) that cover all samples, each `span` samples at most, cut at the quietest place of their end (SEARCH).

    span, window: samples; spans longer than a window take whole ones. Example: 70 s in spans of 30 s → cuts between 24 and 30 s,
    and as far again.
    """
    if span < window and span < audio.SAMPLE_RATE:
        raise UserError(f"a span of {span / audio.SAMPLE_RATE:g} s is too short: give 1 s at least")
    length = span // window * window if span >= window else span
    spans, start = [], 0
    while len(samples) - start > length:
        border = start + length
        stop = _quietest(samples, border - min(SEARCH, length // 2), border)
        spans.append((start, stop))
        start = stop
    return [*spans, (start, len(samples))]


def halves(samples: np.ndarray) -> list[tuple[int, int]]:
    """Two pieces, cut at silence in the middle third; one if they would be too short."""
    if len(samples) < 2 * SMALLEST_PIECE * audio.SAMPLE_RATE:
        return [(0, len(samples))]
    middle = _quietest(samples, len(samples) // 3, 2 * len(samples) // 3)
    return [(0, middle), (middle, len(samples))]


@dataclasses.dataclass
class _Piece:
    """A stretch of a job's samples: where it lies, and its answer. Pieces take the place of one that looped."""

    job: int
    start: int
    stop: int
    answer: Answer | None = None
    after: str = ""  # text before it, for the running prompt


class _Jobs:
    """Pieces of all jobs, and how far each job is."""

    def __init__(self, jobs: Sequence[LongFormRequest], window: int):
        self.jobs = jobs
        self.pieces: list[list[_Piece]] = []
        for number, job in enumerate(jobs):
            is_cut = job.span is not None and TASKS[job.task].is_splittable
            spans = (
                cut(job.samples, round(job.span * audio.SAMPLE_RATE), window)
                if is_cut
                else [(0, len(job.samples))]
            )
            self.pieces.append([_Piece(number, *span) for span in spans])
        self.again = [0] * len(jobs)

    def ready(self) -> list[_Piece]:
        """What can be decoded now: all that is open, but only the first of a job with a running prompt."""
        ready = []
        for job, pieces in zip(self.jobs, self.pieces, strict=True):
            waiting = [piece for piece in pieces if piece.answer is None]
            if job.running_prompt and waiting:
                done = " ".join(piece.answer.text for piece in pieces[: pieces.index(waiting[0])])
                waiting[0].after = " ".join(done.split()[-job.running_prompt :])
                waiting = waiting[:1]
            ready += waiting
        return ready

    def samples(self, piece: _Piece) -> np.ndarray:
        return self.jobs[piece.job].samples[piece.start : piece.stop]

    def split(self, piece: _Piece) -> bool:
        """Replaces a piece that looped by two smaller ones, if it can be."""
        if piece.answer.stop_reason != "loop" or not TASKS[self.jobs[piece.job].task].is_splittable:
            return False
        parts = halves(self.samples(piece))
        if len(parts) == 1:
            return False
        self.again[piece.job] += 1
        pieces = self.pieces[piece.job]
        at = pieces.index(piece)
        pieces[at : at + 1] = [
            _Piece(piece.job, piece.start + low, piece.start + high) for low, high in parts
        ]
        return True


def answer(
    generator: Generator,
    jobs: Sequence[LongFormRequest],
    batch_size: int | None = None,
    *,
    slots: int = 0,
    progress: Callable[[float], None] = lambda _: None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Result]:
    """Answers jobs in their order; spans of all jobs share batches.

    Args:
        batch_size, slots: see `Generator.answer`.
        progress: called with the audio seconds done since the last call.
        on_text: called with a job's number and its text so far, every few tokens; the jobs' spans then go one by one.
    """
    spec = generator.model.window
    state = _Jobs(jobs, spec.samples)
    while ready := state.ready():
        ready = ready[:1] if on_text else ready
        requests = [
            Request(
                state.samples(p), jobs[p.job].task, _instruction(generator, jobs[p.job], p.after)
            )
            for p in ready
        ]
        budgets = [_budget(jobs[p.job], p) for p in ready]

        def on_answer(i, found, ready=ready):
            piece = ready[i]
            piece.answer = found
            if not state.split(piece):
                progress((piece.stop - piece.start) / audio.SAMPLE_RATE)

        listening = _listening(generator, state, ready, on_text)
        generator.answer(
            requests, budgets, batch_size, slots=slots, on_answer=on_answer, **listening
        )
    return [
        _result(job, pieces, again, spec)
        for job, pieces, again in zip(jobs, state.pieces, state.again, strict=True)
    ]


def _budget(job: LongFormRequest, piece: _Piece) -> int:
    grown = budget((piece.stop - piece.start) / audio.SAMPLE_RATE, job.task)
    return job.max_new_tokens or grown


def _instruction(generator: Generator, job: LongFormRequest, after: str) -> str | None:
    if not after:
        return job.instruction
    return f"{job.instruction or TASKS[job.task].instruction}\nIt goes on from: {after}"


def _listening(generator: Generator, state: _Jobs, ready: Sequence[_Piece], on_text) -> dict:
    if on_text is None:
        return {}
    piece = ready[0]
    before = [other.answer.text for other in state.pieces[piece.job] if other.answer is not None]

    def on_tokens(_, tokens):
        on_text(piece.job, " ".join([*before, generator.encoder.decode(tokens)]))

    return {"on_tokens": on_tokens}


def _result(
    job: LongFormRequest, pieces: Sequence[_Piece], again: int, spec: audio.WindowSpec
) -> Result:
    answers = [piece.answer for piece in pieces]
    reasons = {found.stop_reason for found in answers}
    rate = audio.SAMPLE_RATE
    covered = sum(min((p.stop - p.start) / rate, p.answer.windows * spec.seconds) for p in pieces)
    return Result(
        text=" ".join(found.text for found in answers if found.text),
        segments=tuple(
            TranscriptSegment(p.start / rate, p.stop / rate, p.answer.text, p.answer.stop_reason)
            for p in pieces
        ),
        windows=sum(found.windows for found in answers),
        speech_tokens=sum(found.speech_tokens for found in answers),
        covered_seconds=round(min(job.seconds, covered), 3),
        stop_reason=next((reason for reason in ("loop", "budget") if reason in reasons), "eos"),
        new_tokens=sum(len(found.token_ids) for found in answers),
        first_token_seconds=answers[0].first_token_seconds,
        again=again,
    )


def trained_seconds(config, window_seconds: float) -> float:
    """The longest recordings that a model was trained on, by its config; without training data there, 30 windows."""
    sources = [dict(source) for source in config.data.train.values()]
    if not sources:
        return 30 * window_seconds
    return max(
        [
            window_seconds,
            *(source["join"]["max_seconds"] for source in sources if source.get("join")),
        ]
    )


def span_for(
    generator: Generator,
    seconds: float,
    task: str,
    instruction: str | None,
    trained: float,
    choice: str = "auto",
    limit: int | None = None,
) -> float | None:
    """Seconds of a recording's spans, or None for one context: what --span says.

    auto: one context for recordings no longer than the longest of the training (`trained` seconds), and for tasks that need the
    whole; spans of half that length for others, well inside what the training covered, or shorter ones that fit the memory.
    none: one context. A number: seconds.

    Raises:
        UserError: it is none of these, or the recording does not fit (see `Generator.check`).
    """
    if choice not in ("auto", "none"):
        try:
            span = float(choice)
        except ValueError:
            span = 0.0
        if not 1 <= span < float("inf"):
            raise UserError(f"--span={choice}: give auto, none, or seconds (1 at least)")
    else:
        span = None if choice == "none" or seconds <= trained else trained / 2
    if not TASKS[task].is_splittable:
        span = None
    while True:
        try:
            generator.check(needed_positions(generator, seconds, task, instruction, span, limit))
            return span
        except CapacityError as error:
            shorter = min(seconds, span or seconds) / 2
            if (
                choice != "auto"
                or not TASKS[task].is_splittable
                or shorter < generator.model.window.seconds
            ):
                if not TASKS[task].is_splittable:
                    other = f"cut the recording, which {task} hears as a whole"
                else:
                    other = (
                        "take spans (--span=auto)"
                        if span is None
                        else f"take spans shorter than {span:g} s (--span=SECONDS)"
                    )
                raise CapacityError(
                    f"a recording of {seconds / 60:.1f} minutes: {error}, or {other}"
                ) from None
            span = shorter


def needed_positions(
    generator: Generator,
    seconds: float,
    task: str,
    instruction: str | None,
    span: float | None,
    limit: int | None = None,
) -> int:
    """Cache slots that a recording needs, its answer of `limit` tokens included (None: its budget)."""
    longest = min(seconds, span) if span is not None and TASKS[task].is_splittable else seconds
    windows = generator.model.window.count(round(longest * audio.SAMPLE_RATE))
    prompt = (
        len(generator.encoder.prompt_ids(task, instruction))
        + windows * generator.model.tokens_per_window
    )
    return prompt + max(limit or budget(longest, task), CHUNK)
