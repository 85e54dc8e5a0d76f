"""Generation: speech encoded in windows, prompts prefilled, tokens decoded in one compiled loop with a key-value cache.

Shapes are few: prompts are padded to a multiple of PROMPT_STEP and recordings to `window_bucket` windows, so that files of any
length share compiled programs.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax import audio
from fastslm_jax.data.prompts import Encoded, PromptEncoder
from fastslm_jax.models.fastslm import FastSLM

PROMPT_STEP = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """What to answer: samples at 16 kHz (int16; None for a prompt without audio), the task, and an instruction of one's own."""

    samples: np.ndarray | None
    task: str | None = "asr"
    instruction: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """text, and how it came about: stop_reason is "eos", or "budget" when max_new_tokens ran out."""

    text: str
    token_ids: tuple[int, ...]
    windows: int
    speech_tokens: int
    stop_reason: str


def window_bucket(windows: int) -> int:
    """Windows that a recording is padded to: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …"""
    size = 1
    while size < windows:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else 2 ** (size.bit_length())
    return size


@functools.partial(jax.jit, static_argnames="model")
def encode(model: FastSLM, params: dict, windows: jax.Array, frames: jax.Array, recording: jax.Array) -> jax.Array:
    """Cut windows [b, w, samples] → speech tokens [b, w · tokens_per_window, d]."""
    return model.speech_tokens(params, windows, frames, recording)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def generate(
    model: FastSLM, params: dict, tokens: jax.Array, lengths: jax.Array, speech_slot: jax.Array, speech: jax.Array | None,
    budgets: jax.Array, end_id: int, *, max_new_tokens: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Greedy decoding.

    Args:
        tokens: prompts [b, t], right-padded; lengths [b]; speech_slot [b, t] (−1: text).
        speech: speech tokens [b, s, d]; None for prompts without audio, which run with LoRA off.
        budgets: [b], the most new tokens of each row.
        end_id: the token that ends an answer.
        max_new_tokens: the most new tokens of any row (sizes the cache).

    Returns:
        new tokens [b, max_new_tokens] (0 behind the end), and their number [b] with the end token counted.
    """
    batch, length = tokens.shape
    variables, gate = {"params": params["llm"]}, jnp.full((batch, 1), 0.0 if speech is None else 1.0)
    cache = model.llm.init_cache(batch, length + max_new_tokens)
    embeddings = model.splice(params, tokens, speech_slot, speech)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    hidden, cache = model.llm.apply(variables, embeddings, positions, lora_gate=gate, cache=cache)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]

    def body(carry):
        step, cache, logits, out, count, done = carry
        token = jnp.where(done, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        count = count + ~done
        done = done | (token == end_id) | (count >= budgets)
        embedding = model.llm.apply(variables, token[:, None], method="embed")
        hidden, cache = model.llm.apply(variables, embedding, (lengths + step)[:, None], lora_gate=gate, cache=cache)
        return step + 1, cache, model.logits(params, hidden[:, 0]), out, count, done

    def unfinished(carry):
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[5])

    start = (
        jnp.int32(0), cache, model.logits(params, last), jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool),
    )  # fmt: skip
    _, _, _, out, count, _ = jax.lax.while_loop(unfinished, body, start)
    return out, count


class Generator:
    """Answers batches of requests with one model."""

    def __init__(self, model: FastSLM, params: dict, encoder: PromptEncoder):
        self.model, self.params, self.encoder = model, params, encoder

    def answer(self, requests: Sequence[Request], max_new_tokens: Sequence[int], batch_size: int | None = None) -> list[Answer]:
        """Answers requests that all have audio, or that all have none; max_new_tokens bounds each answer.

        batch_size: pad the batch to that many rows, so that a last small batch needs no program of its own.
        """
        real = len(requests)
        padded = list(requests) + [requests[0]] * (max(real, batch_size or 0) - real)
        budgets = np.array(list(max_new_tokens) + [1] * (len(padded) - real), np.int32)
        speech, windows = self._speech(padded)
        per_window = self.model.tokens_per_window
        prompts = [self.encoder.encode(r.task, r.instruction, None, n * per_window) for r, n in zip(padded, windows, strict=True)]
        tokens, lengths, slots = _pad_prompts(prompts)
        limit = -(-int(budgets.max()) // PROMPT_STEP) * PROMPT_STEP
        out, counts = jax.device_get(
            generate(
                self.model, self.params, tokens, lengths, slots, speech, budgets, self.encoder.end_id, max_new_tokens=limit
            )
        )  # fmt: skip
        answers = []
        for i in range(real):
            ids = tuple(int(token) for token in out[i, : counts[i]])
            ended = bool(ids) and ids[-1] == self.encoder.end_id
            ids = ids[:-1] if ended else ids
            stop_reason = "eos" if ended else "budget"
            answers.append(Answer(self.encoder.decode(ids), ids, windows[i], windows[i] * per_window, stop_reason))
        return answers

    def _speech(self, requests: Sequence[Request]) -> tuple[jax.Array | None, list[int]]:
        if requests[0].samples is None:
            return None, [0] * len(requests)
        spec = self.model.window
        cut = [spec.cut(request.samples) for request in requests]
        counts = [len(windows) for windows, _ in cut]
        slots = window_bucket(max(counts))
        windows = np.zeros((len(cut), slots, spec.samples + 2 * audio.CONTEXT), np.int16)
        frames = np.zeros((len(cut), slots), np.int32)
        recording = np.full((len(cut), slots), -1, np.int32)
        for i, (part, valid) in enumerate(cut):
            windows[i, : len(part)], frames[i, : len(part)], recording[i, : len(part)] = part, valid, 0
        return encode(self.model, self.params, windows, frames, recording), counts


def _pad_prompts(prompts: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.array([len(prompt.tokens) for prompt in prompts], np.int32)
    length = -(-int(lengths.max()) // PROMPT_STEP) * PROMPT_STEP
    tokens, slots = np.zeros((len(prompts), length), np.int32), np.full((len(prompts), length), -1, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : lengths[i]] = prompt.tokens
        if prompt.num_speech:
            slots[i, prompt.speech_start : prompt.speech_start + prompt.num_speech] = np.arange(prompt.num_speech)
    return tokens, lengths, slots
