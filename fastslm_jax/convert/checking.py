"""Two forms of a FastSLM side by side: their tensors, and the logits they give for the same audio."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from fastslm_jax import audio
from fastslm_jax.convert import stored
from fastslm_jax.convert.exporting import MODELING
from fastslm_jax.data import prompts
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.weights import engine, layouts
from fastslm_jax.weights.tensors import Tensor

GROUPS = ("encoder", "hfq_former", "llm", "lora", "other")


def check(
    first: str | os.PathLike,
    second: str | os.PathLike,
    *,
    audio_file: str | None = None,
    llm: str | None = None,
    torch: bool = True,
) -> dict:
    """Compares two of (working directory, released state_dict, PyTorch folder).

    Where one has its LoRA merged into the weights, the other's is merged for the comparison.

    Args:
        audio_file: what the logits are computed on (default: a fixed synthetic signal).
        torch: let PyTorch folders give their logits through their own PyTorch code, where PyTorch is installed and the code
            is the one of this package.

    Returns:
        missing (in the second), extra (in the second), misshapen: names; max_abs_difference, max_abs_logit_difference; and
        groups {name: (tensors, largest difference)}, logits_by: which implementation gave the logits of each.
    """
    sides = [stored.open_any(path, llm=llm, strict=False) for path in (first, second)]
    if sides[0].has_lora != sides[1].has_lora:
        sides = [stored.open_any(side.path, llm=llm).merged() for side in sides]
    tensors = [_named(side) for side in sides]
    a, b = tensors
    result = {
        "missing": [a[name].key for name in sorted(set(a) - set(b))],
        "extra": [b[name].key for name in sorted(set(b) - set(a))],
        "misshapen": [
            b[name].key for name in sorted(set(a) & set(b)) if a[name].shape != b[name].shape
        ],
    }
    groups = {}
    for name in sorted(set(a) & set(b)):
        if a[name].shape == b[name].shape:
            count, largest = groups.get(_group(name), (0, 0.0))
            groups[_group(name)] = (count + 1, max(largest, _difference(a[name], b[name])))
    result["max_abs_difference"] = max((largest for _, largest in groups.values()), default=None)
    result["max_abs_logit_difference"] = None
    if not any(result[kind] for kind in ("missing", "extra", "misshapen")):
        samples = (
            synthetic_signal()
            if audio_file is None
            else audio.read_audio(audio_file).astype(np.float32) / 32768.0
        )
        ids = prompt_tokenizer(sides[0]).prompt_ids("asr")
        runs = [run_torch if torch and _mayrun_torch(side) else run_jax for side in sides]
        logits = [
            run(_opened(side, llm), samples, ids) for run, side in zip(runs, sides, strict=True)
        ]
        result["max_abs_logit_difference"] = float(np.abs(logits[0] - logits[1]).max())
        result["max_abs_logit"] = float(np.abs(logits[0]).max())
        result["logits_by"] = ["torch" if run is run_torch else "jax" for run in runs]
    return result | {"groups": groups}


def synthetic_signal(seconds: float = 7.0) -> np.ndarray:
    """Tones that swell and fade over noise: float32 samples in [-1, 1], always the same."""
    t = np.arange(round(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    tones = sum(
        np.sin(2 * np.pi * (f * t + 20 * np.sin(t))) * (1 + np.sin(2 * np.pi * r * t))
        for f, r in ((220, 3), (700, 5), (2500, 2))
    )
    return (0.04 * tones + 0.003 * np.random.default_rng(0).standard_normal(len(t))).astype(
        np.float32
    )


def _named(side: stored.Stored) -> dict[str, Tensor]:
    """Every tensor of a side under its name in our tree; one that the layout does not know keeps its own."""
    if side.leaves:
        found = {}
        for path, leaf in side.leaves.items():
            parts = leaf.parts if isinstance(leaf, engine.StoredLeaf) else ()
            if "/layers/" in path:
                for layer in range(leaf.shape[0]):
                    name = parts[layer].key if parts else f"{path}[{layer}]"
                    found[f"{path}[{layer}]"] = _lazy(name, leaf, layer)
            else:
                found[path] = _lazy(parts[0].key if parts else path, leaf, None)
        return found
    found, unknown = engine.index(side.source, side.layout)
    tied_copy = {
        "released": f"{layouts.RELEASED_LLM}lm_head.weight",
        "hf": f"{layouts.HF_LLM}lm_head.weight",
    }[side.kind]
    if side.model.llm.tied_embeddings and found.get("llm/lm_head", ("",))[0] == tied_copy:
        del found["llm/lm_head"]
    return found | {
        name: Tensor(name, side.source.shape(name), np.dtype(np.float32), lambda: np.zeros(()))
        for name in unknown
    }


def _lazy(name: str, leaf, layer: int | None) -> Tensor:
    shape = tuple(leaf.shape if layer is None else leaf.shape[1:])
    return Tensor(name, shape, np.dtype(leaf.dtype), lambda: engine.part(leaf, layer))


def _group(name: str) -> str:
    if re.search(r"/lora_[ab]", name):
        return "lora"
    return next((group for group in GROUPS if name.startswith(f"{group}/")), "other")


def _difference(a: Tensor, b: Tensor) -> float:
    first, second = a.read(), b.read()
    if first.dtype == second.dtype and np.array_equal(first, second):
        return 0.0
    return float(np.abs(first.astype(np.float32) - second.astype(np.float32)).max(initial=0.0))


def _opened(side: stored.Stored, llm: str | None) -> stored.Stored:
    return side if side.leaves else stored.open_any(side.path, llm=llm)


# --------------------------------------------------------------------------------------------------------------- logits


def materialize(side: stored.Stored) -> dict:
    """The parameter tree on the default device, in the types it is stored in."""
    leaves = {
        path: leaf.read() if isinstance(leaf, engine.StoredLeaf) else leaf
        for path, leaf in side.leaves.items()
    }
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def prompt_tokenizer(side: stored.Stored) -> prompts.PromptTokenizer:
    return prompts.PromptTokenizer(
        prompts.load_tokenizer(side.tokenizer, side.model.llm.vocab_size)
    )


def _in_float32(model: FastSLM) -> FastSLM:
    parts = {"encoder": {"remat": "none"}, "hfq_former": {}, "llm": {"remat": "none"}}
    clones = {
        name: getattr(model, name).clone(dtype=jnp.float32, **options)
        for name, options in parts.items()
    }
    return dataclasses.replace(model, window_batch=0, **clones)


@functools.partial(jax.jit, static_argnames="model")
def _embed(model: FastSLM, params: dict, tokens, slots, windows, frames) -> jax.Array:
    speech = model.speech_tokens(params, windows, frames, jnp.zeros(frames.shape, jnp.int32))
    return model.splice(params, tokens, slots, speech)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: FastSLM, params: dict, embeddings: jax.Array) -> jax.Array:
    hidden, _ = model.llm.apply(
        {"params": params["llm"]}, embeddings, jnp.arange(embeddings.shape[1])[None]
    )
    return model.logits(params, hidden)


def _prompt_embeddings(
    model: FastSLM, params: dict, audio_id: int, samples: np.ndarray, ids: Sequence[int]
) -> jax.Array:
    at = list(ids).index(audio_id)
    windows, frames = model.window.cut(samples)
    num_speech = len(windows) * model.tokens_per_window
    tokens = np.array([*ids[:at], *[0] * num_speech, *ids[at + 1 :]], np.int32)[None]
    slots = np.full(tokens.shape, -1, np.int32)
    slots[0, at : at + num_speech] = np.arange(num_speech)
    return _embed(model, params, tokens, slots, windows[None], frames[None])


def prompt_embeddings(side: stored.Stored, samples: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """A prompt with its speech tokens in place, as the language model takes it: [1, tokens, d] float32."""
    encoder = prompt_tokenizer(side)
    return np.array(
        _prompt_embeddings(
            _in_float32(side.model), materialize(side), encoder.audio_id, samples, ids
        )
    )


def run_jax(side: stored.Stored, samples: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of a prompt, computed in float32."""
    model, params = _in_float32(side.model), materialize(side)
    embeddings = _prompt_embeddings(model, params, prompt_tokenizer(side).audio_id, samples, ids)
    return np.asarray(_logits(model, params, embeddings)[0])


def _mayrun_torch(side: stored.Stored) -> bool:
    """Code is run only if it is, to the byte, the file that this package exports."""
    if side.kind != "hf" or importlib.util.find_spec("torch") is None:
        return False
    code = pathlib.Path(side.path) / MODELING.name
    return code.is_file() and code.read_bytes() == MODELING.read_bytes()


def run_torch(side: stored.Stored, samples: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of a prompt through a PyTorch folder's own code, in float32."""
    import torch
    from transformers.utils import logging

    from fastslm_jax.convert import modeling_fastslm

    logging.disable_progress_bar()
    model = modeling_fastslm.FastSLM.from_pretrained(side.path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(ids), torch.from_numpy(samples)).logits[0].numpy()
