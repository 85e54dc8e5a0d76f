"""Continuous batching: rows decode together, and a finished row takes the next prompt."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fastslm_jax.inference import programs
from fastslm_jax.inference.capacity import PREFILL_CHUNK
from fastslm_jax.inference.programs import DECODE_STEPS, DecodeState
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.kv_cache import KVCache

LONG_CHUNK = 512  # prompt tokens of one row that are prefilled at a time
PREFILL_ROWS = 8
PARTIAL_STEPS = 4  # tokens between partial answers


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request in the form that the decoder takes.

    Attributes:
        tokens: ids [n].
        speech: speech tokens [s, d] that replace tokens from speech_start on; None without audio.
        began: when work on the request began (time.time()).
    """

    tokens: np.ndarray
    speech: np.ndarray | None
    speech_start: int
    max_new_tokens: int
    began: float = 0.0


@dataclasses.dataclass
class Running:
    """A row's prompt and its new tokens so far, the end token included.

    stop_reason is None while the row is running. `number` is the one given to `start`.
    """

    row: int
    number: int
    prompt: Prompt
    tokens: list[int] = dataclasses.field(default_factory=list)
    stop_reason: str | None = None
    first_token_seconds: float = 0.0


class ContinuousBatch:
    """A batch of rows with one key-value cache, for prompts that all have audio, or all have none.

    Args:
        rows: prompts that decode at the same time.
        cache_length: positions of each row, prompt and answer.
        end_ids: the tokens that end an answer.
    """

    def __init__(
        self,
        model: FastSLM,
        params: dict,
        *,
        rows: int,
        cache_length: int,
        cache_dtype: jnp.dtype,
        sampling: SamplingParams,
        end_ids: Sequence[int],
        detect_repetition: bool,
        mesh: Mesh | None,
    ):
        self.model, self.params, self.sampling, self.mesh = model, params, sampling, mesh
        self.end_ids, self.detect_repetition = tuple(end_ids), detect_repetition
        self.cache = programs.empty_cache(
            model, rows=rows, cache_length=cache_length, dtype=cache_dtype, mesh=mesh
        )
        self.state = DecodeState.idle(rows)
        vocabulary = model.llm.vocab_size
        self.seen = np.zeros((rows, vocabulary), bool) if sampling.penalizes else None
        self.running: dict[int, Running] = {}  # by row; other rows are idle
        self._new: list[int] = []  # rows whose prompts are not in the cache yet

    def run(self, prompts: Iterator[Prompt], partial: bool = False) -> Iterator[Running]:
        """Yields finished rows; with `partial`, also running ones every few tokens."""
        waiting = enumerate(prompts)
        upcoming = next(waiting, None)
        while upcoming is not None or self.running:
            while upcoming is not None and self.idle_rows:
                self.start(*upcoming)
                upcoming = next(waiting, None)
            steps = PARTIAL_STEPS if partial else DECODE_STEPS
            for running in self.advance(steps, is_last=upcoming is None):
                if partial or running.stop_reason:
                    yield running

    @property
    def idle_rows(self) -> int:
        return len(self.state.done) - len(self.running)

    def start(self, number: int, prompt: Prompt) -> Running:
        """Assigns a prompt to the first idle row; `number` seeds its random draws."""
        row = next(row for row in range(len(self.state.done)) if row not in self.running)
        running = self.running[row] = Running(row, number, prompt)
        self._new.append(row)
        last = len(prompt.tokens) - 1
        self.state.start(row, int(prompt.tokens[last]), last, prompt.max_new_tokens, number)
        if self.seen is not None:
            self.seen[row] = False
            if prompt.speech is None:
                self.seen[row, prompt.tokens] = True
        return running

    def cancel(self, row: int) -> None:
        """Frees a row before its answer has ended."""
        del self.running[row]
        self._new = [new for new in self._new if new != row]
        self.state.done[row] = True

    def advance(self, max_steps: int, is_last: bool) -> list[Running]:
        """Prefills new prompts and decodes up to max_steps tokens; returns what advanced, by row.

        If prompts are waiting (not is_last), decoding stops as soon as another quarter of the rows
        are done. After a prefill it is a single step, to measure the time to the first token.
        """
        max_steps = 1 if self._new else max_steps
        self._prefill()
        rows = len(self.state.done)
        enough = rows if is_last else rows - len(self.running) + max(1, rows // 4)
        before = self.state.count
        self.cache, state, out = programs.decode(
            self.model,
            self.params,
            self.cache,
            self.state,
            self.seen,
            self.sampling.controls(),
            np.array(self.end_ids, np.int32),
            max_steps,
            enough,
            self.detect_repetition,
            greedy=self.sampling.is_greedy,
            mesh=self.mesh,
        )
        self.state, out = jax.tree.map(np.array, (state, out))
        advanced = sorted(self.running.items())
        for row, running in advanced:
            fresh = out[row, : self.state.count[row] - before[row]].tolist()
            if fresh and not running.tokens:
                running.first_token_seconds = time.time() - running.prompt.began
            running.tokens.extend(fresh)
            if self.seen is not None:
                self.seen[row, fresh] = True
            if self.state.done[row]:
                running.stop_reason = self._stop_reason(row, running)
                del self.running[row]
        return [running for _, running in advanced]

    def _stop_reason(self, row: int, running: Running) -> str:
        if running.tokens[-1] in self.end_ids:
            return "eos"
        return "loop" if self.state.looped[row] else "budget"

    def _prefill(self) -> None:
        """Writes new prompts into the cache, all but their last token.

        Long prompts go row by row in large chunks, the rest in small chunks of several rows.
        """
        new, self._new = self._new, []
        starts = dict.fromkeys(new, 0)
        ends = {row: len(self.running[row].prompt.tokens) - 1 for row in new}
        for row in new:
            while ends[row] - starts[row] >= LONG_CHUNK:
                self.cache = self._prefill_chunk([row], [starts[row]], LONG_CHUNK)
                starts[row] += LONG_CHUNK
        size = min(PREFILL_ROWS, len(self.state.done))
        for first in range(0, len(new), size):
            group = new[first : first + size]
            group += group[:1] * (size - len(group))  # writing the same again changes nothing
            while any(starts[row] < ends[row] for row in group):
                chunk = [starts[row] for row in group]
                self.cache = self._prefill_chunk(group, chunk, PREFILL_CHUNK)
                starts |= {
                    row: min(start + PREFILL_CHUNK, ends[row])
                    for row, start in zip(group, chunk, strict=True)
                }

    def _prefill_chunk(self, rows: Sequence[int], starts: Sequence[int], length: int) -> KVCache:
        """Prefills `length` tokens of each row's prompt, beginning at its start."""
        prompts = [self.running[row].prompt for row in rows]
        tokens = np.zeros((len(rows), length), np.int32)
        speech = is_speech = None
        if prompts[0].speech is not None:
            shape = (len(rows), length)
            speech = np.zeros((*shape, self.model.llm.width), prompts[0].speech.dtype)
            is_speech = np.zeros(shape, bool)
        for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            part = prompt.tokens[start : min(start + length, len(prompt.tokens) - 1)]
            tokens[i, : len(part)] = part
            if speech is None:
                continue
            first = prompt.speech_start
            low = min(max(first, start), start + length)
            high = min(max(first + len(prompt.speech), start), start + length)
            speech[i, low - start : high - start] = prompt.speech[low - first : high - first]
            is_speech[i, low - start : high - start] = True
        return programs.prefill(
            self.model,
            self.params,
            self.cache,
            np.array(rows, np.int32),
            np.array(starts, np.int32),
            tokens,
            speech,
            is_speech,
            mesh=self.mesh,
        )
