"""Compares two stored FastSLMs: their tensors, and their logits for the same audio."""

import functools
import os
import re

import numpy as np

from fastslm_jax import audio
from fastslm_jax.convert import logits, opening
from fastslm_jax.convert.stored import Stored
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.weights import engine
from fastslm_jax.weights.tensors import Tensor

GROUPS = ("encoder", "hfq_former", "adapter", "llm", "lora", "other")
DIFFERENCES = ("missing", "extra", "misshapen")


def check(
    first: str | os.PathLike,
    second: str | os.PathLike,
    *,
    audio_file: str | None = None,
    llm: str | None = None,
    torch: bool = True,
) -> dict:
    """Compares two working directories, released state_dicts or PyTorch folders.

    If LoRA is merged in only one of them, it is merged in the other for the comparison. Logits are
    compared if all names and shapes match.

    Args:
        audio_file: audio to compute the logits for (default: a fixed synthetic signal).
        llm: hub id or folder of the language model, for released state_dicts.
        torch: use PyTorch for the logits of PyTorch folders, if it is installed and the folder's
            code equals this package's.

    Returns:
        missing (in `second`), extra (in `second`), misshapen: lists of tensor names;
        max_abs_difference, max_abs_logit_difference, max_abs_logit: numbers or None;
        logits_by: "jax" or "torch" for each model;
        groups: {name: (number of tensors, largest difference)}.
    """
    models = [opening.open_any(path, llm=llm, strict=False) for path in (first, second)]
    if models[0].has_lora != models[1].has_lora:
        models = [opening.open_any(given.path, llm=llm).merged() for given in models]
    result = compare_tensors(*(_tensors_by_path(given) for given in models))
    result["max_abs_logit_difference"] = None
    if not any(result[kind] for kind in DIFFERENCES):
        if audio_file is None:
            samples = synthetic_signal()
        else:
            samples = audio.read_audio(audio_file).astype(np.float32) / 32768.0
        strict = [
            given if given.leaves else opening.open_any(given.path, llm=llm) for given in models
        ]
        result |= compare_logits(strict, samples, torch)
    return result


def compare_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict:
    """The names and largest differences in the result of `check`."""
    shared = sorted(set(first) & set(second))
    same_shape = [path for path in shared if first[path].shape == second[path].shape]
    misshapen = [path for path in shared if first[path].shape != second[path].shape]
    groups: dict[str, tuple[int, float]] = {}
    for path in same_shape:
        count, largest = groups.get(_group(path), (0, 0.0))
        difference = _difference(first[path], second[path])
        groups[_group(path)] = (count + 1, max(largest, difference))
    return {
        "missing": [first[path].key for path in sorted(set(first) - set(second))],
        "extra": [second[path].key for path in sorted(set(second) - set(first))],
        "misshapen": [second[path].key for path in misshapen],
        "max_abs_difference": max((largest for _, largest in groups.values()), default=None),
        "groups": groups,
    }


def compare_logits(models: list[Stored], samples: np.ndarray, torch: bool) -> dict:
    """The logit fields in the result of `check`, for the transcription prompt."""
    ids = PromptTokenizer(models[0].load_tokenizer()).prompt_ids("asr")
    use_torch = [torch and logits.can_run_torch(given) for given in models]
    first, second = (
        (logits.run_torch if by_torch else logits.run_jax)(given, samples, ids)
        for given, by_torch in zip(models, use_torch, strict=True)
    )
    return {
        "max_abs_logit_difference": float(np.abs(first - second).max()),
        "max_abs_logit": float(np.abs(first).max()),
        "logits_by": ["torch" if by_torch else "jax" for by_torch in use_torch],
    }


def synthetic_signal(seconds: float = 7.0) -> np.ndarray:
    """Modulated tones with noise, deterministic: float32 samples in [-1, 1] at 16 kHz."""
    t = np.arange(round(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    tones = sum(
        np.sin(2 * np.pi * (f * t + 20 * np.sin(t))) * (1 + np.sin(2 * np.pi * r * t))
        for f, r in ((220, 3), (700, 5), (2500, 2))
    )
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.04 * tones + 0.003 * noise).astype(np.float32)


def _tensors_by_path(given: Stored) -> dict[str, Tensor]:
    """All tensors under our names; tensors unknown to the layout keep their own."""
    if given.leaves:
        found = {}
        for path, leaf in given.leaves.items():
            if "/layers/" in path:
                for layer in range(leaf.shape[0]):
                    found[f"{path}[{layer}]"] = _tensor(f"{path}[{layer}]", leaf, layer)
            else:
                found[path] = _tensor(path, leaf, None)
        return found
    found, unknown = engine.match_tensors(given.source, given.layout)
    if given.model.llm.tied_embeddings:
        found.pop("llm/lm_head", None)  # a copy of the embeddings
    for name in unknown:
        shape = given.source.shape(name)
        found[name] = Tensor(name, shape, np.dtype(np.float32), lambda: np.zeros(()))
    return found


def _tensor(name: str, leaf: engine.Leaf, layer: int | None) -> Tensor:
    if isinstance(leaf, engine.StoredLeaf):
        name = leaf.parts[layer or 0].key
    shape = tuple(leaf.shape if layer is None else leaf.shape[1:])
    read = functools.partial(engine.read_part, leaf, layer)
    return Tensor(name, shape, np.dtype(leaf.dtype), read)


def _group(path: str) -> str:
    if re.search(r"/lora_[ab]", path):
        return "lora"
    return next((group for group in GROUPS if path.startswith(f"{group}/")), "other")


def _difference(first: Tensor, second: Tensor) -> float:
    a, b = first.read(), second.read()
    if a.dtype == b.dtype and np.array_equal(a, b):
        return 0.0
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max(initial=0.0))
