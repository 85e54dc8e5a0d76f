"""Logits of a stored FastSLM for one prompt with audio, from JAX or from PyTorch, in float32."""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.convert.exporting import CODE
from fastslm_jax.convert.stored import Stored
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.weights import engine


def materialize(given: Stored) -> dict:
    """The parameter tree on the default device, in the dtypes on disk."""
    leaves = {
        path: jnp.asarray(leaf.read() if isinstance(leaf, engine.StoredLeaf) else leaf)
        for path, leaf in given.leaves.items()
    }
    return engine.unflatten(leaves)


def prompt_embeddings(
    given: Stored, params: dict, samples: np.ndarray, ids: Sequence[int]
) -> jax.Array:
    """Input embeddings of the language model, with speech tokens in place of <|AUDIO|>.

    Args:
        samples: float32 [n] in [-1, 1] at 16 kHz.
        ids: prompt with <|AUDIO|> as one id.

    Returns:
        [1, tokens, d] float32.
    """
    model = _in_float32(given.model)
    position = list(ids).index(PromptTokenizer(given.load_tokenizer()).audio_id)
    windows, frames = model.window.cut(samples)
    num_speech = len(windows) * model.tokens_per_window
    tokens = np.array([*ids[:position], *[0] * num_speech, *ids[position + 1 :]], np.int32)[None]
    slots = np.full(tokens.shape, -1, np.int32)
    slots[0, position : position + num_speech] = np.arange(num_speech)
    return _embed(model, params, tokens, slots, windows[None], frames[None])


def run_jax(given: Stored, samples: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] from JAX; see `prompt_embeddings` for the arguments."""
    params = materialize(given)
    embeddings = prompt_embeddings(given, params, samples, ids)
    return np.asarray(_logits(_in_float32(given.model), params, embeddings)[0])


def run_torch(given: Stored, samples: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of a PyTorch folder from PyTorch."""
    import torch
    from transformers.utils import logging

    from fastslm_jax.convert.feature_extraction_fastslm import FastSLMFeatureExtractor
    from fastslm_jax.convert.modeling_fastslm import FastSLMForConditionalGeneration

    logging.disable_progress_bar()
    model = FastSLMForConditionalGeneration.from_pretrained(given.path, dtype=torch.float32)
    extractor = FastSLMFeatureExtractor.from_pretrained(given.path)
    inputs = extractor(samples, return_tensors="pt")
    speech = [model.config.audio_token_id] * int(inputs["num_audio_tokens"])
    tokens = [one for id in ids for one in (speech if id == speech[0] else [id])]
    with torch.no_grad():
        return model(torch.tensor([tokens]), **inputs).logits[0].numpy()


def can_run_torch(given: Stored) -> bool:
    """Whether PyTorch is installed and the folder's code equals this package's, byte for byte."""
    needed = ["torch", "peft"] if given.has_lora else ["torch"]
    if given.kind != "hf" or not all(map(importlib.util.find_spec, needed)):
        return False
    files = {given.path / ours.name: ours for ours in CODE}
    return all(
        file.is_file() and file.read_bytes() == ours.read_bytes() for file, ours in files.items()
    )


def _in_float32(model: FastSLM) -> FastSLM:
    return dataclasses.replace(
        model,
        window_batch=0,
        encoder=model.encoder.clone(dtype=jnp.float32, remat="none"),
        adapter=model.adapter.clone(dtype=jnp.float32),
        llm=model.llm.clone(dtype=jnp.float32, remat="none"),
    )


@functools.partial(jax.jit, static_argnames="model")
def _embed(
    model: FastSLM,
    params: dict,
    tokens: jax.Array,
    slots: jax.Array,
    windows: jax.Array,
    frames: jax.Array,
) -> jax.Array:
    speech = model.speech_tokens(params, windows, frames, jnp.zeros(frames.shape, jnp.int32))
    return model.splice(params, tokens, slots, speech)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: FastSLM, params: dict, embeddings: jax.Array) -> jax.Array:
    positions = jnp.arange(embeddings.shape[1])[None]
    hidden, _ = model.llm.apply({"params": params["llm"]}, embeddings, positions)
    return model.logits(params, hidden)
