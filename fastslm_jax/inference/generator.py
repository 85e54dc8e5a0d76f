"""Generates answers for batches of requests: capacity, speech encoding and continuous batching."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.inference import programs, repetition
from fastslm_jax.inference.batching import ContinuousBatch, Prompt, Running
from fastslm_jax.inference.capacity import Capacity, bucketed_length, rows_for
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.inference.speech import SpeechEncoder
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA

WINDOW_BATCH = 8
MAX_BATCH_SIZE = 16  # default rows of a batch


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt: samples (int16 at 16 kHz; None without audio), task, and an optional instruction.

    Without audio, the instruction is the whole user turn and LoRA is off.
    """

    samples: np.ndarray | None
    task: str | None = "asr"
    instruction: str | None = None
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        stop_reason: "eos"; "budget" if max_new_tokens ran out; "loop" if the answer began to repeat
            itself (the repetitions are cut); None while it is still being generated.
        first_token_seconds: from the start of the request's encoding.
    """

    text: str
    token_ids: tuple[int, ...]
    windows: int
    speech_tokens: int
    stop_reason: str | None
    first_token_seconds: float = dataclasses.field(default=0.0, compare=False)


class Generator:
    """A model that answers requests with continuous batching.

    Args:
        params: nested parameters, on one device or sharded over a mesh.
        native_positions: context length that the language model was trained for; YaRN extends it up
            to four times. None: unlimited.
        cache_dtype: of the key-value cache (bfloat16, int8, …); default: the model's.
        window_batch: windows per encoder micro-batch.
        detect_repetition: whether to end answers that repeat themselves.
    """

    def __init__(
        self,
        model: FastSLM,
        params: dict,
        prompt_tokenizer: PromptTokenizer,
        *,
        native_positions: int | None = None,
        cache_dtype: jnp.dtype | str | None = None,
        sampling: SamplingParams = SamplingParams(),
        window_batch: int = WINDOW_BATCH,
        detect_repetition: bool = True,
    ):
        if _platform_of(params) == "gpu" and model.llm.scan_layers:
            model = dataclasses.replace(model, llm=model.llm.clone(scan_layers=False))
            params = programs.separate_layers(params)
        self.model, self.params = model, params
        self.prompt_tokenizer, self.sampling = prompt_tokenizer, sampling
        self.detect_repetition = detect_repetition
        self.mesh = _mesh_of(params)
        shards = programs.row_shards(self.mesh)
        dtype = jnp.dtype(cache_dtype or model.llm.dtype)
        self.capacity = Capacity(model, prompt_tokenizer, dtype, native_positions, shards)
        whole = dataclasses.replace(model, window_batch=0)  # SpeechEncoder batches windows
        window_batch = -(-window_batch // shards) * shards
        self.encode_speech = SpeechEncoder(whole, params, window_batch, self.mesh)

    def stream(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        cache_length: int = 0,
        partial: bool = False,
    ) -> Iterator[tuple[int, Answer]]:
        """Yields (index of the request, answer) as answers end.

        Args:
            batch_size: rows of the batch (default: one per request, up to 16); long contexts use
                fewer.
            cache_length: minimum cache length, so that several calls share compiled programs.
            partial: also yield answers in progress, every few tokens.

        Raises:
            memory.CapacityError: a request exceeds the model's context or the memory.
        """
        needed = [self.positions(request) for request in requests]
        self.capacity.check(max(needed, default=0))
        groups: dict[tuple[bool, float], list[int]] = {}  # requests that share a model
        for i, request in enumerate(requests):
            key = (request.samples is not None, self.capacity.yarn_factor(needed[i]))
            groups.setdefault(key, []).append(i)
        for (has_audio, yarn), members in groups.items():
            longest = max(needed[i] for i in members)
            length = max(cache_length, bucketed_length(longest))
            default = min(MAX_BATCH_SIZE, 1 << (len(members) - 1).bit_length())
            rows = rows_for(batch_size or default, length)
            self.capacity.check(longest, rows)
            batch = self.open_batch(has_audio, yarn, rows, length)
            for running in batch.run(self.prompts([requests[i] for i in members]), partial):
                i = members[running.number]
                yield i, self.answer_of(requests[i], running)

    def answer(self, requests: Sequence[Request], **options: int | None) -> list[Answer]:
        """The answers in the order of their requests; see `stream` for the options."""
        answers = dict(self.stream(requests, **options))
        return [answers[i] for i in range(len(requests))]

    def open_batch(
        self,
        has_audio: bool,
        yarn: float,
        rows: int,
        cache_length: int,
        sampling: SamplingParams | None = None,
    ) -> ContinuousBatch:
        """An empty batch for prompts that all have audio, or all have none (default sampling: the
        generator's)."""
        return ContinuousBatch(
            *self._variant(has_audio, yarn),
            rows=rows,
            cache_length=cache_length,
            cache_dtype=self.capacity.cache_dtype,
            sampling=sampling or self.sampling,
            end_ids=self.prompt_tokenizer.end_ids,
            detect_repetition=self.detect_repetition,
            mesh=self.mesh,
        )

    def positions(self, request: Request) -> int:
        """Cache positions of a request, prompt and answer."""
        num_samples = None if request.samples is None else len(request.samples)
        task = None if request.samples is None else request.task
        return self.capacity.positions(
            num_samples, task, request.instruction, request.max_new_tokens
        )

    def _windows(self, request: Request) -> int:
        return 0 if request.samples is None else self.model.window.count(len(request.samples))

    def _variant(self, has_audio: bool, yarn: float) -> tuple[FastSLM, dict]:
        """The model to run: no LoRA without audio, YaRN beyond the native context."""
        model, params = self.encode_speech.model, self.params
        if not has_audio:
            model = dataclasses.replace(model, llm=model.llm.clone(lora=LoRA()))
            leaves = flatten_dict(params, sep="/")
            base = {path: leaf for path, leaf in leaves.items() if "/lora_" not in path}
            params = unflatten_dict(base, sep="/")
        if yarn != 1:
            native = self.capacity.native_positions
            scaling = {"kind": "yarn", "factor": yarn, "original_max_positions": native}
            rope = dataclasses.replace(model.llm.rope, **scaling)
            model = dataclasses.replace(model, llm=model.llm.clone(rope=rope))
        return model, params

    def prompts(self, requests: Sequence[Request]) -> Iterator[Prompt]:
        """Prompts in order; recordings are encoded just before their prompts are needed."""
        for members in self.encode_speech.groups([self._windows(r) for r in requests]):
            began = time.time()
            recordings = [requests[i].samples for i in members]
            has_audio = any(samples is not None for samples in recordings)
            speech = self.encode_speech(recordings) if has_audio else [None] * len(members)
            for i, tokens in zip(members, speech, strict=True):
                request = requests[i]
                task = None if tokens is None else request.task
                num_speech = 0 if tokens is None else len(tokens)
                encoded = self.prompt_tokenizer.encode(task, request.instruction, None, num_speech)
                yield Prompt(
                    encoded.tokens, tokens, encoded.speech_start, request.max_new_tokens, began
                )

    def answer_of(self, request: Request, running: Running) -> Answer:
        """The answer so far of a row."""
        tokens = tuple(running.tokens)
        if running.stop_reason == "eos":
            tokens = tokens[:-1]
        elif running.stop_reason == "loop":
            tokens = repetition.without_repeats(tokens)
        windows = self._windows(request)
        return Answer(
            self.prompt_tokenizer.decode(tokens),
            tokens,
            windows,
            windows * self.model.tokens_per_window,
            running.stop_reason,
            round(running.first_token_seconds, 4),
        )


def _mesh_of(params: dict) -> Mesh | None:
    """The mesh that parameters are sharded over; None: one device."""
    leaf = jax.tree.leaves(params)[0]
    placed = leaf.sharding if isinstance(leaf, jax.Array) else None
    return placed.mesh if isinstance(placed, NamedSharding) and placed.mesh.size > 1 else None


def _platform_of(params: dict) -> str:
    """The platform of the parameters: "cpu", "gpu" or "tpu"."""
    leaf = jax.tree.leaves(params)[0]
    return next(iter(leaf.devices())).platform if isinstance(leaf, jax.Array) else "cpu"
