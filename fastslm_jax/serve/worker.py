"""The thread that owns the model: it decodes all clients' requests together."""

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator

import numpy as np
from absl import logging

from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.errors import UserError
from fastslm_jax.inference import long_form
from fastslm_jax.inference.api import DEFAULT_TOKENS, Model
from fastslm_jax.inference.long_form import Plan, Recording, Result
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.inference.scheduler import Job, Scheduler, TextPlan
from fastslm_jax.serve.limits import ApiError


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
    """A client's request to the model.

    Attributes:
        samples: int16 at 16 kHz; None: a text prompt.
        instruction: None: the task's.
        max_new_tokens: of each segment; None: the default.
        partial: whether to report every few tokens.
    """

    samples: np.ndarray | None
    task: str = "asr"
    instruction: str | None = None
    sampling: SamplingParams = SamplingParams()
    max_new_tokens: int | None = None
    partial: bool = False

    @property
    def seconds(self) -> float:
        return 0.0 if self.samples is None else len(self.samples) / SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class Progress:
    """A result so far, and the tokens of its prompts."""

    result: Result
    prompt_tokens: int


class _Ticket:
    """Hands the newest progress of an ask from the worker to a client's coroutine."""

    def __init__(self, ask: Ask):
        self.ask: Ask | None = ask
        self.job: Job | None = None
        self.newest: Progress | Exception | None = None
        self.changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def publish(self, news: Progress | Exception) -> None:
        """Called by the worker."""
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._set, news)

    def _set(self, news: Progress | Exception) -> None:
        self.newest = news
        self.changed.set()


class Worker(threading.Thread):
    """Decodes asks in its own thread.

    Args:
        batch_size: rows that decode at the same time.
        span: see `long_form.with_segments`.
    """

    def __init__(self, model: Model, batch_size: int = 16, span: str = "auto"):
        super().__init__(name="model", daemon=True)
        self.model, self.span = model, span
        self.scheduler = Scheduler(model.generator, batch_size)
        self._inbox: queue.SimpleQueue[tuple[str, _Ticket | None]] = queue.SimpleQueue()
        self._tickets: dict[Job, _Ticket] = {}

    async def results(self, ask: Ask) -> AsyncGenerator[Progress, None]:
        """Progress until the result is complete; leaving early cancels the ask.

        A slow client misses some progress, never the last.

        Raises:
            ApiError: the ask cannot be answered.
        """
        ticket = _Ticket(ask)
        self._inbox.put(("add", ticket))
        del ask
        try:
            while True:
                await ticket.changed.wait()
                ticket.changed.clear()
                news = ticket.newest
                if isinstance(news, Exception):
                    raise news
                yield news
                if news.result.stop_reason is not None:
                    return
        finally:
            self._inbox.put(("cancel", ticket))

    def stop(self) -> None:
        """Ends the thread and drops pending asks."""
        self._inbox.put(("stop", None))
        self.join()

    def run(self) -> None:
        while self._receive():
            try:
                advanced = self.scheduler.step()
            except Exception as error:  # of the device: memory, or a fault
                logging.exception("decoding failed")
                self._fail_all(error)
                continue
            for job in advanced:
                self._publish(job)

    def _receive(self) -> bool:
        """Takes new asks; waits for one if the batch is idle. False: stop."""
        while True:
            try:
                kind, ticket = self._inbox.get(block=not self.scheduler.jobs)
            except queue.Empty:
                return True
            if kind == "stop":
                return False
            if kind == "add":
                self._add(ticket)
            elif ticket.job is not None:
                self.scheduler.remove(ticket.job)
                self._tickets.pop(ticket.job, None)
                ticket.job = None

    def _add(self, ticket: _Ticket) -> None:
        ask, ticket.ask = ticket.ask, None
        try:
            job = Job(self._plan(ask), ask.sampling, ask.partial)
            self.scheduler.add(job)
        except UserError as error:
            status = 413 if isinstance(error, long_form.CapacityError) else 400
            ticket.publish(ApiError(status, str(error)))
        except Exception as error:
            logging.exception("a request failed")
            ticket.publish(_server_error(error))
        else:
            ticket.job = job
            self._tickets[job] = ticket

    def _plan(self, ask: Ask) -> Plan | TextPlan:
        if ask.samples is None:
            return TextPlan(ask.instruction, ask.max_new_tokens or DEFAULT_TOKENS)
        generator, samples = self.model.generator, ask.samples
        recording = Recording(
            ask.seconds,
            lambda: samples,
            ask.task,
            ask.instruction,
            max_new_tokens=ask.max_new_tokens,
        )
        recording = long_form.with_segments(
            generator.capacity, recording, self.model.trained_seconds, self.span
        )
        return Plan(recording, generator.model.window)

    def _publish(self, job: Job) -> None:
        ticket = self._tickets[job]
        if job.plan.is_done:
            del self._tickets[job]
            ticket.job = None
        elif not job.partial:
            return
        ticket.publish(Progress(job.plan.result(), job.prompt_tokens))

    def _fail_all(self, error: Exception) -> None:
        self.scheduler.clear()
        for ticket in self._tickets.values():
            ticket.job = None
            ticket.publish(_server_error(error))
        self._tickets.clear()


def _server_error(error: Exception) -> ApiError:
    return ApiError(500, f"the model failed ({type(error).__name__}); see the server's log")
