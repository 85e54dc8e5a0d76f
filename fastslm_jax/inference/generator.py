"""Generation: requests of any length through a few compiled programs.

The encoder takes windows in micro-batches of one size, prompts enter the cache in chunks of two sizes, and one loop decodes rows
(see `lanes`). Only the cache's size depends on the longest request, and it comes in few sizes.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from fastslm_jax import memory
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.inference import programs, repetition
from fastslm_jax.inference.batching import CHUNK, Lane, Prompt
from fastslm_jax.inference.programs import STEPS
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models import log_mel
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA

WINDOW_BATCH = 8
STREAM_STEPS = 4  # tokens between two calls of on_tokens
YARN_FACTORS = (2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to answer: samples at 16 kHz (int16; None for a prompt without audio), the task, and an instruction of one's own."""

    samples: np.ndarray | None
    task: str | None = "asr"
    instruction: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """text, and how it came about: stop_reason is "eos", "budget" when max_new_tokens ran out, or "loop" when the answer began
    to repeat itself (its repetitions are left out). first_token_seconds counts from the start of the request's encoding."""

    text: str
    token_ids: tuple[int, ...]
    windows: int
    speech_tokens: int
    stop_reason: str
    first_token_seconds: float = dataclasses.field(default=0.0, compare=False)


def bucketed_length(positions: int) -> int:
    """Slots of a cache for that many positions: 256, 512, 1024, … 8192, then in steps of an eighth of a power of two."""
    power = max(256, 1 << (positions - 1).bit_length())
    if power <= 8192:
        return power
    return -(-positions // (power // 16)) * (power // 16)


class Generator:
    """Answers lists of requests with one model."""

    def __init__(
        self,
        model: FastSLM,
        params: dict,
        encoder: PromptTokenizer,
        *,
        native_positions: int | None = None,
        cache_dtype=None,
        sampling: SamplingParams = SamplingParams(),
        window_batch: int = WINDOW_BATCH,
        detect_repetition: bool = True,
    ):
        """
        Args:
            native_positions: positions that the language model was trained for; up to four times as many go by YaRN. None: no
                bound.
            cache_dtype: of the key-value cache (bfloat16, int8, …); None: the model's.
            window_batch: windows in the encoder at a time.
        """
        self.model, self.params, self.encoder, self.sampling = model, params, encoder, sampling
        self.native_positions, self.detect_repetition = native_positions, detect_repetition
        self.cache_dtype = jnp.dtype(cache_dtype or model.llm.dtype)
        placed = (
            jax.tree.leaves(params)[0].sharding
            if isinstance(jax.tree.leaves(params)[0], jax.Array)
            else None
        )
        self.mesh = (
            placed.mesh if isinstance(placed, NamedSharding) and placed.mesh.size > 1 else None
        )
        parts = programs.shards(self.mesh)
        self.window_batch = -(-window_batch // parts) * parts
        self._speaking = dataclasses.replace(model, window_batch=0)
        leaves = flatten_dict(params, sep="/")
        # Prompts without audio: the base's own modules and weights, no LoRA that would be switched off.
        self._base = dataclasses.replace(model, llm=model.llm.clone(lora=LoRA()))
        self._base_params = unflatten_dict(
            {path: leaf for path, leaf in leaves.items() if "/lora_" not in path}, sep="/"
        )

    # ------------------------------------------------------------------------------------------------------------ capacity

    def positions(self, request: Request, budget: int) -> int:
        """Cache slots that a request needs, its answer included."""
        prompt = len(
            self.encoder.prompt_ids(
                request.task if request.samples is not None else None, request.instruction
            )
        )
        if request.samples is not None:
            prompt += (
                self.model.window.count(len(request.samples)) * self.model.tokens_per_window - 1
            )
        return prompt + max(budget, CHUNK)

    def cache_bytes(self, rows: int, length: int) -> int:
        """Bytes of a key-value cache, over all devices."""
        llm = self.model.llm
        return memory.kv_cache_bytes(
            layers=llm.num_layers, rows=rows, length=length, kv_heads=llm.num_kv_heads,
            head_dim=llm.head_dim, dtype=self.cache_dtype,
        )  # fmt: skip

    @property
    def most_positions(self) -> int | None:
        """The longest context that the model takes, YaRN included; None: no bound."""
        if self.native_positions is None:
            return None
        is_extended = self.model.llm.rope.factor != 1
        return (
            self.native_positions if is_extended else int(self.native_positions * YARN_FACTORS[-1])
        )

    def check(self, positions: int, rows: int = 1) -> None:
        """Refuses what cannot be done, before any work starts.

        Raises:
            memory.CapacityError: the context is longer than the model's, or the cache does not fit the memory that is free.
        """
        most = self.most_positions
        if most is not None and positions > most:
            minutes = most / self.model.tokens_per_window * self.model.window.seconds / 60
            raise memory.CapacityError(
                f"{positions} positions (speech, prompt and answer) are needed and the language model takes {most}, the speech "
                f"of {minutes:.3g} minutes: lower --max_new_tokens"
            )
        parts = programs.shards(self.mesh) if rows % programs.shards(self.mesh) == 0 else 1
        needed, free = (
            self.cache_bytes(rows, bucketed_length(positions)) / parts,
            memory.free_bytes(),
        )
        if free is not None and needed > 0.9 * free:
            raise memory.CapacityError(
                f"{positions} positions need a key-value cache of {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
                "use --kv_cache=int8, or lower --max_new_tokens"
            )

    def yarn_factor(self, positions: int) -> float:
        """How far YaRN must stretch the native context; 1: not at all."""
        native = self.native_positions
        if native is None or positions <= native or self.model.llm.rope.factor != 1:
            return 1.0
        return next(factor for factor in YARN_FACTORS if positions <= factor * native)

    def _variant(self, has_audio: bool, yarn: float) -> tuple[FastSLM, dict]:
        """The model and parameters to run: without LoRA if there is no audio, with YaRN past the native context."""
        model, params = (
            (self._speaking, self.params) if has_audio else (self._base, self._base_params)
        )
        if yarn == 1:
            return model, params
        rope = dataclasses.replace(
            model.llm.rope, factor=yarn, original_max_positions=self.native_positions
        )
        return dataclasses.replace(model, llm=model.llm.clone(rope=rope)), params

    # ----------------------------------------------------------------------------------------------------------- answering

    def answer(
        self,
        requests: Sequence[Request],
        max_new_tokens: Sequence[int],
        batch_size: int | None = None,
        *,
        slots: int = 0,
        on_tokens: Callable[[int, Sequence[int]], None] | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answers requests in their order, as many at a time as batch_size says; max_new_tokens bounds each answer.

        Args:
            batch_size: rows of the batch (default: as many as requests, up to 16). A longer context has fewer rows.
            slots: the least size of the cache, so that several calls share one.
            on_tokens: called with a request's number and its tokens so far, every few tokens.
            on_answer: called with a request's number and its answer, as answers end.
        """
        answers: list[Answer | None] = [None] * len(requests)
        positions = [
            self.positions(request, budget)
            for request, budget in zip(requests, max_new_tokens, strict=True)
        ]
        self.check(max(positions, default=0))
        groups: dict[
            tuple[bool, float], list[int]
        ] = {}  # what shares a model: with or without audio, with or without YaRN
        for i, request in enumerate(requests):
            groups.setdefault(
                (request.samples is not None, self.yarn_factor(positions[i])), []
            ).append(i)
        for (_, yarn), members in groups.items():
            longest = max(positions[i] for i in members)
            size = max(slots, bucketed_length(longest))
            rows = rows_for(batch_size or min(16, 1 << (len(members) - 1).bit_length()), size)
            self.check(longest, rows)
            prompts = self._prompts(
                [requests[i] for i in members], [max_new_tokens[i] for i in members]
            )
            listen = (
                None
                if on_tokens is None
                else lambda i, tokens, members=members: on_tokens(members[i], tokens)
            )
            for number, tokens, reason, seconds in self.run(
                prompts, rows=rows, slots=size, yarn=yarn, on_tokens=listen
            ):
                i = members[number]
                answers[i] = self._answer(requests[i], tokens, reason, seconds)
                if on_answer is not None:
                    on_answer(i, answers[i])
        return answers

    def _answer(
        self, request: Request, tokens: Sequence[int], reason: str, seconds: float
    ) -> Answer:
        windows = 0 if request.samples is None else self.model.window.count(len(request.samples))
        ids = (
            tuple(tokens[:-1])
            if reason == "eos"
            else repetition.without_repeats(tokens)
            if reason == "loop"
            else tuple(tokens)
        )
        text = self.encoder.decode(ids)
        return Answer(
            text, ids, windows, windows * self.model.tokens_per_window, reason, round(seconds, 4)
        )

    def _prompts(
        self, requests: Sequence[Request], budgets: Sequence[int]
    ) -> Iterator[tuple[float, Prompt]]:
        """(when its work began, prompt) of each request; recordings go through the encoder as their turn comes."""
        spec, number = self.model.window, 0
        while number < len(requests):
            began, group, windows = time.time(), [], 0
            while number + len(group) < len(requests):
                request = requests[number + len(group)]
                count = 0 if request.samples is None else spec.count(len(request.samples))
                if group and windows + count > self.window_batch:
                    break
                group.append(request)
                windows += count
            speech = (
                self.speech([request.samples for request in group])
                if windows
                else [None] * len(group)
            )
            for request, tokens in zip(group, speech, strict=True):
                task = None if tokens is None else request.task
                encoded = self.encoder.encode(
                    task, request.instruction, None, 0 if tokens is None else len(tokens)
                )
                yield began, Prompt(encoded.tokens, tokens, encoded.speech_start, budgets[number])
                number += 1

    def speech(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Speech tokens [windows · tokens_per_window, d] of recordings, on the host.

        Several recordings of window_batch windows together, or one of any length: its windows go in micro-batches, twice, as
        log-mel needs the maximum of the whole recording first.
        """
        model, size, spec = self._speaking, self.window_batch, self.model.window
        frames = [spec.valid_frames(len(samples)) for samples in recordings]
        counts = [len(part) for part in frames]
        if sum(counts) > size and len(counts) > 1:
            raise ValueError(
                f"{len(counts)} recordings have {sum(counts)} windows, more than the {size} of a micro-batch"
            )
        rows = 1 if sum(counts) == 1 else size
        frames, recording = (
            np.concatenate(frames),
            np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        )

        def padded(array, fill):
            return np.concatenate(
                [array, np.full((rows - len(array), *array.shape[1:]), fill, array.dtype)]
            )

        def batches():  # (windows, frames, recording) of each micro-batch
            for at in range(0, len(frames), rows):
                part = slice(at, at + rows)
                if len(counts) == 1:
                    windows = spec.windows(recordings[0], at, min(at + rows, len(frames)))
                else:
                    windows = np.concatenate(
                        [
                            spec.windows(samples, 0, n)
                            for samples, n in zip(recordings, counts, strict=True)
                        ]
                    )
                yield padded(windows, 0), padded(frames[part], 0), padded(recording[part], -1)

        highest = log_mel.LOWEST
        if len(frames) > rows:
            # One micro-batch at a time, so that no more than its inputs wait on the device.
            highest = max(
                float(
                    np.max(np.asarray(programs.window_maxima(model, *inputs[:2], mesh=self.mesh)))
                )
                for inputs in batches()
            )
        elsewhere = np.full(rows, highest, np.float32)
        encoded = [
            np.asarray(programs.encode(model, self.params, *inputs, elsewhere, mesh=self.mesh))
            for inputs in batches()
        ]
        tokens = np.concatenate(encoded)[: len(frames)]
        return [
            part.reshape(-1, part.shape[-1]) for part in np.split(tokens, np.cumsum(counts)[:-1])
        ]

    def run(
        self, prompts: Iterator[tuple[float, Prompt]], *, rows: int, slots: int, yarn: float = 1.0,
        on_tokens: Callable[[int, Sequence[int]], None] | None = None,
    ) -> Iterator[tuple[int, list[int], str, float]]:  # fmt: skip
        """Continuous batching of prompts that all have audio, or that all have none, in lanes (see `lanes`).

        Yields:
            a prompt's number, its new tokens with the end token, stop reason, and seconds to its first token; as they end.
        """
        prompts = enumerate(prompts)
        upcoming = next(prompts, None)
        if upcoming is None:
            return
        model, params = self._variant(upcoming[1][1].speech is not None, yarn)
        batch = Lane(
            model, params, rows=rows, slots=slots, cache_dtype=self.cache_dtype, sampling=self.sampling,
            end_id=self.encoder.end_id, detect_repetition=self.detect_repetition, mesh=self.mesh,
        )  # fmt: skip
        while upcoming is not None or batch.work:
            while upcoming is not None and batch.has_room:
                batch.begin(upcoming[0], *upcoming[1])
                upcoming = next(prompts, None)
            steps = 1 if batch.new else STREAM_STEPS if on_tokens else STEPS
            for work in batch.advance(steps, upcoming is None):
                if on_tokens:
                    on_tokens(work.number, work.tokens)
                if work.reason:
                    yield work.number, work.tokens, work.reason, work.first_seconds


def rows_for(batch_size: int, slots: int) -> int:
    """Rows of a batch: half as many whenever the cache's rows are twice as long as 1 024."""
    return max(1, min(batch_size, batch_size * 1024 // slots))
