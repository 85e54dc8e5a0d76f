"""Continuous batching: rows that decode together, and take the next prompt when they are done.

A lane is a batch with its own cache. An accelerator works on one. A CPU with a small decoder has one lane a core: a product of
few rows and small weights keeps no more than one core at work.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from fastslm_jax.inference import programs
from fastslm_jax.inference.programs import DecodeState
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.kv_cache import KVCache

CHUNK = 32  # prompt tokens of several rows at a time
LONG_CHUNK = 512  # prompt tokens of one row at a time
CHUNK_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request as the decoder takes it: ids [n], and speech tokens [s, d] that stand at speech_start (−1: none)."""

    tokens: np.ndarray
    speech: np.ndarray | None
    speech_start: int
    budget: int


@dataclasses.dataclass
class Work:
    """What a row is at: the prompt's number, when it began, its new tokens so far (the end token too), and, once it is done,
    its stop reason; first_seconds: from its beginning to its first token."""

    number: int
    began: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: str = ""
    first_seconds: float = 0.0


class Lane:
    """Prompts that all have audio, or that all have none, in the rows of one batch."""

    def __init__(
        self, model: FastSLM, params: dict, *, rows: int, slots: int, cache_dtype, sampling: SamplingParams, end_id: int,
        detect_repetition: bool, mesh: Mesh | None,
    ):  # fmt: skip
        self.model, self.params, self.sampling, self.mesh = model, params, sampling, mesh
        self.end_id, self.detect_repetition = end_id, detect_repetition
        self.cache = programs.empty_cache(
            model, rows=rows, slots=slots, dtype=cache_dtype, mesh=mesh
        )
        self.rows = DecodeState.idle(rows)
        self.seen = np.zeros((rows, model.llm.vocab_size), bool) if sampling.penalizes else None
        self.work: dict[int, Work] = {}  # of each row that is not idle
        self.new: list[tuple[int, Prompt]] = []  # rows and prompts that are not in the cache yet

    @property
    def has_room(self) -> bool:
        return len(self.work) < len(self.rows.done)

    def begin(self, number: int, began: float, prompt: Prompt) -> None:
        """Gives the first idle row a prompt."""
        row = next(row for row in range(len(self.rows.done)) if row not in self.work)
        self.work[row] = Work(number, began)
        self.new.append((row, prompt))
        self.rows.begin(row, int(prompt.tokens[-1]), len(prompt.tokens) - 1, prompt.budget, number)
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, [] if prompt.speech is not None else prompt.tokens] = True

    def advance(self, max_steps: int, is_last: bool) -> list[Work]:
        """Prefills what is new and decodes up to max_steps tokens; done rows turn idle. The work that got on, in rows' order.

        is_last: no prompt waits for a row; else it is enough that a quarter of the rows are done.
        """
        count = len(self.rows.done)
        enough = count if is_last else count - len(self.work) + max(1, count // 4)
        before = self.rows.count.copy()
        self._prefill()
        self.cache, rows, out = programs.decode(
            self.model, self.params, self.cache, self.rows, self.seen, self.sampling.controls(), self.end_id,
            max_steps, enough, self.detect_repetition, greedy=self.sampling.is_greedy, mesh=self.mesh,
        )  # fmt: skip
        self.rows, out = jax.tree.map(np.array, (rows, out))
        advanced = [(row, self.work[row]) for row in sorted(self.work)]
        for row, work in advanced:
            fresh = out[row, : self.rows.count[row] - before[row]].tolist()
            if fresh and not work.tokens:
                work.first_seconds = time.time() - work.began
            work.tokens.extend(fresh)
            if self.seen is not None:
                self.seen[row, fresh] = True
            if self.rows.done[row]:
                work.reason = (
                    "eos"
                    if work.tokens[-1] == self.end_id
                    else "loop"
                    if self.rows.looped[row]
                    else "budget"
                )
                del self.work[row]
        return [work for _, work in advanced]

    def _prefill(self) -> None:
        """All but the last token of new prompts, into their rows: long stretches row by row, what is left in groups of rows."""
        new, self.new = self.new, []
        starts = [0] * len(new)
        for i, (row, prompt) in enumerate(new):
            while len(prompt.tokens) - 1 - starts[i] >= LONG_CHUNK:
                self.cache = self._chunk([(row, prompt, starts[i])], LONG_CHUNK)
                starts[i] += LONG_CHUNK
        size = min(CHUNK_ROWS, len(self.rows.done))
        for first in range(0, len(new), size):
            group = [(*new[i], starts[i]) for i in range(first, min(first + size, len(new)))]
            group += group[:1] * (size - len(group))  # the same once more changes nothing
            while any(start < len(prompt.tokens) - 1 for _, prompt, start in group):
                self.cache = self._chunk(group, CHUNK)
                group = [
                    (row, prompt, min(start + CHUNK, len(prompt.tokens) - 1))
                    for row, prompt, start in group
                ]

    def _chunk(self, group: Sequence[tuple[int, Prompt, int]], length: int) -> KVCache:
        """`length` tokens of (row, prompt, first token) each."""
        tokens, speech, is_speech = np.zeros((len(group), length), np.int32), None, None
        if group[0][1].speech is not None:
            speech = np.zeros((len(group), length, self.model.llm.width), group[0][1].speech.dtype)
            is_speech = np.zeros((len(group), length), bool)
        for i, (_, prompt, start) in enumerate(group):
            part = prompt.tokens[start : min(start + length, len(prompt.tokens) - 1)]
            tokens[i, : len(part)] = part
            if speech is None:
                continue
            low, high = (
                min(max(at, start), start + length)
                for at in (prompt.speech_start, prompt.speech_start + len(prompt.speech))
            )
            speech[i, low - start : high - start] = prompt.speech[
                low - prompt.speech_start : high - prompt.speech_start
            ]
            is_speech[i, low - start : high - start] = True
        rows, starts = (np.array([entry[at] for entry in group], np.int32) for at in (0, 2))
        return programs.prefill(
            self.model, self.params, self.cache, rows, starts, tokens, speech, is_speech, mesh=self.mesh
        )  # fmt: skip
