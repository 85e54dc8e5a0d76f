"""Continuous batching of jobs that arrive while others decode: the engine of the server.

An answer does not depend on the other jobs: the shapes of the programs that encode and decode a
request follow from the request itself.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from fastslm_jax.inference.batching import PARTIAL_STEPS, ContinuousBatch
from fastslm_jax.inference.capacity import bucketed_length, rows_for
from fastslm_jax.inference.generator import MAX_BATCH_SIZE, Answer, Generator, Request
from fastslm_jax.inference.long_form import Piece, Plan, Result
from fastslm_jax.inference.programs import DECODE_STEPS
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.memory import CapacityError

MIN_CACHE_LENGTH = 1024  # shorter contexts share a batch: they have as many rows (see `rows_for`)
MAX_LANES = 4  # batches, each with its own key-value cache
JOIN_STEPS = 16  # tokens until a new job can take an idle row


class TextPlan:
    """A prompt without audio, as a plan of one piece (see `long_form.Plan`)."""

    def __init__(self, instruction: str, max_new_tokens: int):
        self._request = Request(None, None, instruction, max_new_tokens)
        self.pieces = [Piece(0, 0)]

    @property
    def is_done(self) -> bool:
        return self.pieces[0].is_done

    def ready(self) -> list[Piece]:
        return [piece for piece in self.pieces if not piece.is_done]

    def request(self, piece: Piece) -> Request:
        return self._request

    def update(self, piece: Piece, answer: Answer) -> None:
        piece.answer = answer

    def result(self) -> Result:
        answer = self.pieces[0].answer or Answer("", (), 0, 0, None)
        return Result(
            text=answer.text,
            seconds=0.0,
            segments=(),
            windows=0,
            speech_tokens=0,
            covered_seconds=0.0,
            stop_reason=answer.stop_reason,
            new_tokens=len(answer.token_ids),
            first_token_seconds=answer.first_token_seconds,
            again=0,
        )


@dataclasses.dataclass(eq=False)
class Job:
    """A plan in progress.

    Attributes:
        partial: whether it advances every few tokens, or only when a piece is done.
        prompt_tokens: of the prompts so far, speech tokens included.
        running: pieces that are being decoded, with the batch and row of each (-1: not yet).
    """

    plan: Plan | TextPlan
    sampling: SamplingParams = SamplingParams()
    partial: bool = False
    prompt_tokens: int = 0
    running: dict[Piece, tuple["_Lane", int]] = dataclasses.field(default_factory=dict)

    def next_piece(self) -> Piece | None:
        """The first piece that is ready and not running."""
        return next((piece for piece in self.plan.ready() if piece not in self.running), None)


class _Key(NamedTuple):
    """Requests with the same key share a batch."""

    has_audio: bool
    yarn: float
    cache_length: int
    sampling: SamplingParams


@dataclasses.dataclass(eq=False)
class _Lane:
    """A batch, what its rows decode, and what will take its idle rows."""

    batch: ContinuousBatch
    rows: dict[int, tuple[Job, Piece, Request]] = dataclasses.field(default_factory=dict)
    next: list[tuple[Job, Piece, Request]] = dataclasses.field(default_factory=list)


class Scheduler:
    """Decodes jobs together; for one thread. Idle rows go to the job with the fewest running.

    Args:
        batch_size: rows of a batch; long contexts use fewer.
    """

    def __init__(self, generator: Generator, batch_size: int = MAX_BATCH_SIZE):
        self.generator, self.batch_size = generator, batch_size
        self.jobs: list[Job] = []  # by arrival
        self._lanes: dict[_Key, _Lane] = {}

    def add(self, job: Job) -> None:
        """Queues a job.

        Raises:
            CapacityError: it exceeds the model's context or the memory.
        """
        for piece in job.plan.ready():
            self.generator.capacity.check(self.generator.positions(job.plan.request(piece)))
        self.jobs.append(job)

    def remove(self, job: Job) -> None:
        """Cancels a job and frees its rows; a job that has ended is ignored."""
        for lane, row in job.running.values():
            lane.batch.cancel(row)
            del lane.rows[row]
        job.running.clear()
        if job in self.jobs:
            self.jobs.remove(job)

    def clear(self) -> None:
        """Drops all jobs and batches."""
        self.jobs.clear()
        self._lanes.clear()

    @property
    def rows_running(self) -> int:
        return sum(len(lane.rows) for lane in self._lanes.values())

    def step(self) -> list[Job]:
        """Starts waiting pieces and decodes a few tokens; returns the jobs that advanced."""
        self._admit()
        for lane in self._lanes.values():
            self._start(lane)
        lanes = [lane for lane in self._lanes.values() if lane.rows]
        advanced = dict.fromkeys(job for lane in lanes for job in self._advance(lane))
        self.jobs = [job for job in self.jobs if not job.plan.is_done]
        return list(advanced)

    def _admit(self) -> None:
        """Assigns idle rows. A job that needs another batch than the open ones is not overtaken."""
        while True:
            for job in sorted(self.jobs, key=lambda job: len(job.running)):
                piece = job.next_piece()
                if piece is None:
                    continue
                request = job.plan.request(piece)
                key = self._key(job, request)
                lane = self._lanes.get(key) or self._open(key, request)
                if lane is None:
                    return
                if len(lane.next) < lane.batch.idle_rows:
                    lane.next.append((job, piece, request))
                    job.running[piece] = (lane, -1)
                    break
            else:
                return

    def _key(self, job: Job, request: Request) -> _Key:
        positions = self.generator.positions(request)
        return _Key(
            request.samples is not None,
            self.generator.capacity.yarn_factor(positions),
            max(MIN_CACHE_LENGTH, bucketed_length(positions)),
            job.sampling,
        )

    def _open(self, key: _Key, request: Request) -> _Lane | None:
        """A new batch in place of idle ones; None if it must wait for another one to end."""
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane.rows or lane.next}
        if len(self._lanes) == MAX_LANES:
            return None
        rows = rows_for(self.batch_size, key.cache_length)
        while True:
            try:
                self.generator.capacity.check(self.generator.positions(request), rows)
                break
            except CapacityError:
                if self._lanes:
                    return None
                if rows == 1:
                    raise
                rows //= 2
        batch = self.generator.open_batch(
            key.has_audio, key.yarn, rows, key.cache_length, key.sampling
        )
        self._lanes[key] = lane = _Lane(batch)
        return lane

    def _start(self, lane: _Lane) -> None:
        """Encodes what is next: single windows alone, others in micro-batches of one shape."""
        alone, together = [], []
        for pick in lane.next:
            samples = pick[2].samples
            is_long = samples is not None and self.generator.model.window.count(len(samples)) > 1
            (together if is_long else alone).append(pick)
        lane.next = []
        for picks in (together, *([pick] for pick in alone)):
            prompts = self.generator.prompts([request for *_, request in picks])
            for (job, piece, request), prompt in zip(picks, prompts, strict=True):
                # The piece's place seeds its draws, so that they do not depend on other jobs.
                row = lane.batch.start(piece.start, prompt).row
                lane.rows[row] = (job, piece, request)
                job.running[piece] = (lane, row)
                job.prompt_tokens += len(prompt.tokens)

    def _advance(self, lane: _Lane) -> Iterator[Job]:
        if any(job.partial for job, *_ in lane.rows.values()):
            steps = PARTIAL_STEPS
        else:
            steps = JOIN_STEPS if lane.batch.idle_rows else DECODE_STEPS
        for running in lane.batch.advance(steps, is_last=False):
            job, piece, request = lane.rows[running.row]
            if running.stop_reason is None and not job.partial:
                continue
            job.plan.update(piece, self.generator.answer_of(request, running))
            if running.stop_reason is not None:
                del lane.rows[running.row], job.running[piece]
            yield job
