"""Recordings of any length: in one context, or in segments cut at silence.

A segment whose answer ends in a repetition loop is split in two and decoded again.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fastslm_jax import devices
from fastslm_jax.audio import SAMPLE_RATE, WindowSpec
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.inference.capacity import Capacity, bucketed_length
from fastslm_jax.inference.cutting import cut, halves
from fastslm_jax.inference.generator import Answer, Generator, Request
from fastslm_jax.memory import CapacityError

# Speech has up to three words per second, and a word takes about two tokens.
TOKENS_PER_SECOND = 6.0
SUMMARY_TOKENS_PER_SECOND = 0.1  # summaries and answers grow more slowly beyond SUMMARY_TOKENS
SUMMARY_TOKENS = 448
MIN_NEW_TOKENS = 64
GROUP_SECONDS = 3600.0  # of audio in memory at a time


def default_new_tokens(seconds: float, task: str) -> int:
    """The default token budget of an answer; it grows with the audio, so that no text is cut."""
    tokens = TOKENS_PER_SECOND * seconds
    if not TASKS[task].is_splittable:
        tokens = min(tokens, SUMMARY_TOKENS + SUMMARY_TOKENS_PER_SECOND * seconds)
    return MIN_NEW_TOKENS + int(tokens)


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording and what to do with it.

    Attributes:
        seconds: its length.
        read: loads the samples, int16 at 16 kHz.
        segment_seconds: length of the segments it is cut into; None: one context.
        context_words: words of the transcript so far that the next segment's prompt quotes;
            segments are then decoded one after another.
        max_new_tokens: token budget of each segment; None: `default_new_tokens`.
        redo_loops: split a segment that ends in a repetition loop, and decode it again.
    """

    seconds: float
    read: Callable[[], np.ndarray]
    task: str = "asr"
    instruction: str | None = None
    segment_seconds: float | None = None
    context_words: int = 0
    max_new_tokens: int | None = None
    redo_loops: bool = True


@dataclasses.dataclass(frozen=True)
class TranscriptSegment:
    """The text from `start` to `end`, in seconds: boundaries of segments, not of words."""

    start: float
    end: float
    text: str
    stop_reason: str | None


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer to a recording, from all its segments so far.

    Attributes:
        seconds: length of the decoded audio.
        covered_seconds: audio processed so far; at the end all of it, except for less than one
            frame (10 ms).
        stop_reason: "loop" or "budget" if any segment ended that way, else "eos"; None if the
            result is incomplete.
        again: segments that ended in a loop and were split and decoded again.
        run_seconds: this recording's share of its group's run time, without compilation.
        compile_seconds: of its group.
        rtfx: audio seconds per second of run time, of its group.
    """

    text: str
    seconds: float
    segments: tuple[TranscriptSegment, ...]
    windows: int
    speech_tokens: int
    covered_seconds: float
    stop_reason: str | None
    new_tokens: int
    first_token_seconds: float
    again: int
    run_seconds: float = 0.0
    compile_seconds: float = 0.0
    rtfx: float = 0.0


def stream(
    generator: Generator,
    recordings: Sequence[Recording],
    *,
    batch_size: int | None = None,
    in_order: bool = False,
    partial: bool = False,
    failed: Callable[[int, UserError], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yields (index, result) of recordings; segments of several recordings share batches.

    A result without a stop reason is yielded each time a segment ends; the complete one, with a
    stop reason and timing, when its group of recordings is done.

    Args:
        batch_size: see `Generator.stream`.
        in_order: keep the order of the recordings; by default they are grouped by cache length.
        partial: also yield a result every few tokens; segments are then decoded one by one.
        failed: called with (index, error) for a recording that cannot be read, instead of raising
            the error; the others are answered.
    """
    lengths = [cache_length(generator.capacity, recording) for recording in recordings]
    order = sorted(range(len(recordings)), key=lambda i: (lengths[i], recordings[i].seconds, i))
    if in_order:
        order, lengths = sorted(order), [max(lengths, default=0)] * len(lengths)
    for members in _groups(order, lengths, recordings):
        plans = []
        for i in tuple(members):
            try:
                plans.append(Plan(recordings[i], generator.model.window))
            except UserError as error:
                if failed is None:
                    raise
                failed(i, error)
                members.remove(i)
        if not plans:
            continue
        started, before = time.time(), devices.compiled_so_far()
        for number in _answer(generator, plans, batch_size, lengths[members[0]], partial):
            yield members[number], dataclasses.replace(plans[number].result(), stop_reason=None)
        compiling = (devices.compiled_so_far() - before).seconds
        running = max(1e-9, time.time() - started - compiling)
        seconds = sum(plan.seconds for plan in plans)
        for i, plan in zip(members, plans, strict=True):
            yield (
                i,
                dataclasses.replace(
                    plan.result(),
                    run_seconds=running * plan.seconds / seconds,
                    compile_seconds=compiling,
                    rtfx=seconds / running,
                ),
            )


def _groups(
    order: Sequence[int], lengths: Sequence[int], recordings: Sequence[Recording]
) -> Iterator[list[int]]:
    """Consecutive recordings of one cache length, up to GROUP_SECONDS of audio."""
    members: list[int] = []
    total = 0.0
    for i in order:
        seconds = recordings[i].seconds
        if members and (lengths[i] != lengths[members[0]] or total + seconds > GROUP_SECONDS):
            yield members
            members, total = [], 0.0
        members.append(i)
        total += seconds
    if members:
        yield members


def _answer(
    generator: Generator,
    plans: Sequence["Plan"],
    batch_size: int | None,
    cache_length: int,
    partial: bool,
) -> Iterator[int]:
    """Answers all pieces; yields the index of a plan each time it advances."""
    while True:
        ready = [(number, piece) for number, plan in enumerate(plans) for piece in plan.ready()]
        ready = ready[:1] if partial else ready
        if not ready:
            return
        requests = [plans[number].request(piece) for number, piece in ready]
        for i, answer in generator.stream(
            requests, batch_size=batch_size, cache_length=cache_length, partial=partial
        ):
            number, piece = ready[i]
            plans[number].update(piece, answer)
            yield number


@dataclasses.dataclass(eq=False)
class Piece:
    """Samples [start, stop) of a recording, and their answer."""

    start: int
    stop: int
    answer: Answer | None = None

    @property
    def is_done(self) -> bool:
        return self.answer is not None and self.answer.stop_reason is not None


class Plan:
    """A recording's samples and its pieces, in order; a piece that loops is replaced by two."""

    def __init__(self, recording: Recording, window: WindowSpec):
        self.recording, self.window, self.samples = recording, window, recording.read()
        self.is_splittable = TASKS[recording.task].is_splittable
        self.again = 0
        pieces = [(0, len(self.samples))]
        if recording.segment_seconds is not None and self.is_splittable:
            length = round(recording.segment_seconds * SAMPLE_RATE)
            pieces = cut(self.samples, length, window.samples)
        self.pieces = [Piece(*piece) for piece in pieces]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    @property
    def is_done(self) -> bool:
        return all(piece.is_done for piece in self.pieces)

    def ready(self) -> list[Piece]:
        """Pieces that can be decoded now: with context words, only the first unfinished one."""
        waiting = [piece for piece in self.pieces if not piece.is_done]
        return waiting[:1] if self.recording.context_words else waiting

    def request(self, piece: Piece) -> Request:
        recording, samples = self.recording, self.samples[piece.start : piece.stop]
        instruction = recording.instruction
        if recording.context_words:
            done = self.pieces[: self.pieces.index(piece)]
            words = " ".join(other.answer.text for other in done).split()
            if words:
                base = instruction or TASKS[recording.task].instruction
                context = " ".join(words[-recording.context_words :])
                instruction = f"{base}\nThe transcript so far ends with: {context}"
        budget = default_new_tokens(len(samples) / SAMPLE_RATE, recording.task)
        budget = recording.max_new_tokens or budget
        return Request(samples, recording.task, instruction, budget)

    def update(self, piece: Piece, answer: Answer) -> None:
        """Records an answer, or splits its piece if it ends in a loop."""
        piece.answer = answer
        if answer.stop_reason != "loop" or not (self.is_splittable and self.recording.redo_loops):
            return
        parts = halves(self.samples[piece.start : piece.stop])
        if len(parts) > 1:
            self.again += 1
            at = self.pieces.index(piece)
            start = piece.start
            self.pieces[at : at + 1] = [Piece(start + low, start + high) for low, high in parts]

    def result(self) -> Result:
        answered = [piece for piece in self.pieces if piece.answer is not None]
        answers = [piece.answer for piece in answered]
        covered = sum(
            min((piece.stop - piece.start) / SAMPLE_RATE, answer.windows * self.window.seconds)
            for piece, answer in zip(answered, answers, strict=True)
            if piece.is_done
        )
        reason = None
        if self.is_done:
            reasons = {answer.stop_reason for answer in answers}
            reason = next((name for name in ("loop", "budget") if name in reasons), "eos")
        return Result(
            text=" ".join(answer.text for answer in answers if answer.text),
            seconds=self.seconds,
            segments=tuple(
                TranscriptSegment(
                    piece.start / SAMPLE_RATE,
                    piece.stop / SAMPLE_RATE,
                    piece.answer.text,
                    piece.answer.stop_reason,
                )
                for piece in answered
            ),
            windows=sum(answer.windows for answer in answers),
            speech_tokens=sum(answer.speech_tokens for answer in answers),
            covered_seconds=round(min(self.seconds, covered), 3),
            stop_reason=reason,
            new_tokens=sum(len(answer.token_ids) for answer in answers),
            first_token_seconds=answers[0].first_token_seconds if answers else 0.0,
            again=self.again,
        )


# ---------------------------------------------------------------------------------- segment length


def trained_seconds(sources: Mapping[str, Mapping], window_seconds: float) -> float:
    """Seconds of the longest recordings in config.data.train; 30 windows if it is empty."""
    if not sources:
        return 30 * window_seconds
    joins = (dict(source).get("join") for source in sources.values())
    return max([window_seconds, *(join["max_seconds"] for join in joins if join)])


def positions(capacity: Capacity, recording: Recording) -> int:
    """Cache positions that the longest segment of a recording needs, its answer included."""
    longest, task = recording.seconds, recording.task
    if recording.segment_seconds is not None and TASKS[task].is_splittable:
        longest = min(longest, recording.segment_seconds)
    budget = recording.max_new_tokens or default_new_tokens(longest, task)
    num_samples = round(longest * SAMPLE_RATE)
    return capacity.positions(num_samples, task, recording.instruction, budget)


def cache_length(capacity: Capacity, recording: Recording) -> int:
    return bucketed_length(positions(capacity, recording))


def with_segments(
    capacity: Capacity, recording: Recording, trained: float, choice: str = "auto"
) -> Recording:
    """Sets the length of a recording's segments from the --span flag.

    Args:
        trained: seconds of the longest recordings in training.
        choice: "none": one context. Seconds: segments of this length. "auto": one context for
            recordings up to `trained` and for tasks that need the whole recording; otherwise
            segments of half of `trained`, well inside the training range, or shorter if memory
            requires it.

    Raises:
        UserError: choice is invalid.
        CapacityError: the recording does not fit; the message gives the fix.
    """
    is_splittable = TASKS[recording.task].is_splittable
    length = _segment_seconds(choice, recording.seconds, trained)
    length = length if is_splittable else None
    while True:
        recording = dataclasses.replace(recording, segment_seconds=length)
        try:
            capacity.check(positions(capacity, recording))
            return recording
        except CapacityError as error:
            shorter = min(recording.seconds, length or recording.seconds) / 2
            can_shorten = choice == "auto" and is_splittable
            if not can_shorten or shorter < capacity.model.window.seconds:
                if not is_splittable:
                    other = f"cut the recording: {recording.task} needs it as a whole"
                elif length is None:
                    other = "use segments (--span=auto)"
                else:
                    other = f"use segments shorter than {length:g} s (--span=SECONDS)"
                raise CapacityError(
                    f"a recording of {recording.seconds / 60:.1f} minutes: {error}, or {other}"
                ) from None
            length = shorter


def _segment_seconds(choice: str, seconds: float, trained: float) -> float | None:
    span = parse_span(choice)
    if span == "auto":
        return trained / 2 if seconds > trained else None
    return span


def parse_span(choice: str) -> float | str | None:
    """The --span flag: "auto", None for one context, or seconds.

    Raises:
        UserError: it is invalid.
    """
    if choice in ("auto", "none"):
        return choice if choice == "auto" else None
    try:
        length = float(choice)
    except ValueError:
        length = 0.0
    if not 1 <= length < float("inf"):
        raise UserError(f"--span={choice}: use auto, none, or a number of seconds (at least 1)")
    return length
