"""The public models that FastSLM stands on, straight from their Hugging Face folders (or hub ids).

Every size is read from the folder's config.json. A folder holds config.json, safetensors and, for the language model, the
tokenizer.
"""

import hashlib
import json
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from fastslm_jax.errors import UserError
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.qwen3 import Qwen3, RoPE
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.weights import engine, layouts
from fastslm_jax.weights.tensors import ConversionError, SafetensorsSource, TensorSource


class BaseError(UserError):
    """A base model that cannot be used: names the folder, what is wrong and how to mend it."""


def resolve(name: str, *, weights: bool = True) -> pathlib.Path:
    """A local folder, or the local copy of a Hugging Face hub id such as "Qwen/Qwen3-4B" (downloaded when missing)."""
    if os.path.isdir(name):
        return pathlib.Path(name)
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise BaseError(
            f"{name}: no such folder; give a folder with config.json and safetensors, or a hub id such as Qwen/Qwen3-4B"
        )
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "*.txt"] + (["*.safetensors"] if weights else [])
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*.fp32*", "*.fp16*"]
        )
        return pathlib.Path(folder)
    except Exception as error:  # the hub's client raises many kinds, all with the same meaning here
        raise BaseError(
            f"{name}: neither a folder here nor reachable on the Hugging Face hub ({type(error).__name__})"
        ) from None


def read_config(folder: str | os.PathLike) -> dict:
    path = pathlib.Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise BaseError(f"{path}: missing; a base model's folder holds its config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BaseError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise BaseError(f"{path}: holds no JSON object")
    return config


def _sizes(config: dict, keys: tuple[str, ...], origin: str) -> list[int]:
    for key in keys:
        if config.get(key) is None:
            raise BaseError(f"{origin}: config.json has no {key!r}")
        if not isinstance(config[key], int) or config[key] < 1:
            raise BaseError(
                f"{origin}: config.json has {key} {config[key]!r}, a positive whole number is needed"
            )
    return [config[key] for key in keys]


def whisper_from_config(
    config: dict, *, dtype=jnp.float32, remat: str = "none", origin: str = "whisper"
) -> WhisperEncoder:
    """The encoder that a Whisper config.json describes (any size; large-v3-turbo has the same encoder as large-v3)."""
    keys = (
        "d_model",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "num_mel_bins",
        "max_source_positions",
    )
    width, num_layers, num_heads, mlp_dim, num_mels, max_positions = _sizes(config, keys, origin)
    if width % num_heads:
        raise BaseError(
            f"{origin}: config.json has d_model {width}, which {num_heads} heads do not divide"
        )
    if config.get("activation_function", "gelu") != "gelu":
        raise BaseError(
            f"{origin}: activation {config['activation_function']!r} is not supported, Whisper's is gelu"
        )
    return WhisperEncoder(
        width, num_layers, num_heads, mlp_dim, num_mels, max_positions, remat=remat, dtype=dtype
    )


def _rope_from_config(config: dict, origin: str) -> RoPE:
    # transformers 5 writes rope_parameters, which hold the theta too; before, there were rope_theta and rope_scaling.
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise BaseError(
            f"{origin}: a partial rotary embedding is not part of Qwen3 and not supported"
        )
    if kind == "default":
        return RoPE(theta=theta)
    if kind != "yarn":
        raise BaseError(f"{origin}: rope type {kind!r} is not supported (default and yarn are)")
    if parameters.get("mscale") or parameters.get("truncate") is False:
        raise BaseError(f"{origin}: YaRN with mscale or without truncation is not supported")
    longest = config.get("max_position_embeddings")
    original = parameters.get("original_max_position_embeddings") or longest
    factor = parameters.get("factor") or (original and longest and longest / original)
    if not original or not factor:
        raise BaseError(
            f"{origin}: config.json gives YaRN no factor, or no original_max_position_embeddings"
        )
    return RoPE(
        theta=theta,
        factor=float(factor),
        original_max_positions=int(original),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        attention_factor=parameters.get("attention_factor"),
    )


def qwen3_from_config(
    config: dict,
    *,
    lora: LoRA = LoRA(),
    dtype=jnp.float32,
    remat: str = "none",
    origin: str = "qwen3",
) -> Qwen3:
    """The decoder that a dense Qwen3 config.json describes."""
    if config.get("model_type") != "qwen3":
        raise BaseError(
            f"{origin}: model_type is {config.get('model_type')!r}; a dense Qwen3 ('qwen3') is needed"
        )
    keys = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    )
    sizes = _sizes(config, keys, origin)
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise BaseError(
            f"{origin}: config.json has {config['num_attention_heads']} heads, which its {config['num_key_value_heads']} "
            "key-value heads do not divide"
        )
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if (
        config.get("use_sliding_window")
        or config.get("attention_bias")
        or layer_types != {"full_attention"}
    ):
        raise BaseError(
            f"{origin}: sliding windows and attention biases are not part of the released Qwen3 and not supported"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise BaseError(
            f"{origin}: activation {config['hidden_act']!r} is not supported, Qwen3's is silu"
        )
    return Qwen3(
        *sizes,
        rope=_rope_from_config(config, origin),
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        lora=lora,
        remat=remat,
        dtype=dtype,
    )


def _whisper_layout(source: TensorSource) -> engine.Layout:
    prefixes, keys = ("model.encoder.", "encoder.", ""), source.keys()
    return layouts.hf_whisper(
        next((prefix for prefix in prefixes if f"{prefix}conv1.weight" in keys), prefixes[0])
    )


def load_whisper(folder: str | os.PathLike, tree: dict) -> dict:
    """Encoder parameters from a Whisper folder, into the shapes, types and shardings of `tree`."""
    source = SafetensorsSource(folder)
    return engine.load(
        source, _whisper_layout(source), tree, layouts.HF_WHISPER_IGNORED, f"{folder}/config.json"
    )


def open_whisper(folder: str | os.PathLike, leaves: dict) -> dict[str, engine.StoredLeaf]:
    """As `load_whisper`, for flat leaves with shapes: checked, read when asked for, in the file's types."""
    source = SafetensorsSource(folder)
    return engine.open_leaves(
        source, _whisper_layout(source), leaves, layouts.HF_WHISPER_IGNORED, f"{folder}/config.json"
    )


def load_qwen3(folder: str | os.PathLike, tree: dict) -> dict:
    """Decoder parameters (without LoRA) from a Qwen3 folder, into the shapes, types and shardings of `tree`."""
    source = SafetensorsSource(folder)
    ignore = tied_head(source, "") if "lm_head" not in tree else ()
    return engine.load(source, layouts.hf_qwen3(), tree, ignore, f"{folder}/config.json")


def open_qwen3(folder: str | os.PathLike, leaves: dict) -> dict[str, engine.StoredLeaf]:
    """As `load_qwen3`, for flat leaves with shapes: checked, read when asked for, in the file's types."""
    source = SafetensorsSource(folder)
    ignore = tied_head(source, "") if "lm_head" not in leaves else ()
    return engine.open_leaves(source, layouts.hf_qwen3(), leaves, ignore, f"{folder}/config.json")


def tied_head(source: TensorSource, prefix: str) -> tuple[str, ...]:
    """Patterns of tensors to ignore when embeddings are tied: a copy of the embeddings, which some files hold.

    Raises:
        ConversionError: it is no copy (judged by 512 of its rows), so embeddings are not tied as config.json says.
    """
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if {head, embedding} <= source.keys():
        rows = (slice(0, 256), slice(-256, None))
        same = source.shape(head) == source.shape(embedding)
        if not same or not all(
            np.array_equal(source.read(head, (part,)), source.read(embedding, (part,)))
            for part in rows
        ):
            raise ConversionError(
                f"{source.path}: tensor {head} differs from the embeddings, but config.json says tie_word_embeddings"
            )
    return (re.escape(head),)


def fingerprint(folder: str | os.PathLike) -> str:
    """Content hash of a base's config and weights: of every byte of config.json and of each file's size and tensor table,
    first and last mebibyte. Reading 9 GB for each start would cost minutes; these parts change whenever a model does."""
    digest = hashlib.sha256()
    folder = pathlib.Path(folder)
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:32]
