"""Whisper and Qwen3 from Hugging Face folders or hub ids.

A folder has config.json, safetensors files and, for the language model, a tokenizer. All sizes are
read from config.json.
"""

import hashlib
import json
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fastslm_jax.errors import UserError
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.qwen3 import Qwen3, RoPE
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.weights import engine, layouts
from fastslm_jax.weights.tensors import ConversionError, SafetensorsSource, TensorSource


class PretrainedError(UserError):
    """An unusable pretrained model. Names the folder, the problem and the fix."""


def resolve(name: str, *, weights: bool = True) -> pathlib.Path:
    """The local folder of a pretrained model, downloaded if `name` is a Hugging Face hub id.

    Args:
        weights: False downloads only the config and the tokenizer.
    """
    if os.path.isdir(name):
        return pathlib.Path(name)
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise PretrainedError(
            f"{name}: no such folder; give a folder with config.json and safetensors files, "
            "or a hub id such as Qwen/Qwen3-4B"
        )
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "*.txt"] + (["*.safetensors"] if weights else [])
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*.fp32*", "*.fp16*"]
        )
        return pathlib.Path(folder)
    except Exception as error:  # the hub client raises many types, all with this meaning
        raise PretrainedError(
            f"{name}: not a local folder and not available on the Hugging Face hub "
            f"({type(error).__name__}); check the name and the network"
        ) from None


def read_config(folder: str | os.PathLike) -> dict:
    """The folder's config.json."""
    path = pathlib.Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise PretrainedError(
            f"{path}: no such file; the folder of a pretrained model must contain it"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{path}: invalid JSON ({error})") from None
    if not isinstance(config, dict):
        raise PretrainedError(f"{path}: not a JSON object")
    return config


def _sizes(config: dict, keys: tuple[str, ...], origin: str) -> list[int]:
    for key in keys:
        if config.get(key) is None:
            raise PretrainedError(f"{origin}: config.json has no {key!r}")
        if not isinstance(config[key], int) or config[key] < 1:
            raise PretrainedError(
                f"{origin}: config.json has {key} {config[key]!r}, expected a positive integer"
            )
    return [config[key] for key in keys]


def whisper_from_config(
    config: dict, *, dtype: DTypeLike = jnp.float32, remat: str = "none", origin: str = "whisper"
) -> WhisperEncoder:
    """Builds the encoder of a Whisper config.json of any size.

    Args:
        origin: where the config comes from, for error messages.
    """
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
        raise PretrainedError(
            f"{origin}: config.json has d_model {width}, which is not divisible by its "
            f"{num_heads} heads"
        )
    if config.get("activation_function", "gelu") != "gelu":
        raise PretrainedError(
            f"{origin}: activation {config['activation_function']!r} is not supported, "
            "expected gelu"
        )
    return WhisperEncoder(
        width, num_layers, num_heads, mlp_dim, num_mels, max_positions, remat=remat, dtype=dtype
    )


def _rope_from_config(config: dict, origin: str) -> RoPE:
    # transformers 5 has rope_parameters, including theta; transformers 4 has rope_theta and
    # rope_scaling.
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise PretrainedError(f"{origin}: partial rotary embeddings are not supported")
    if rope_type == "default":
        return RoPE(theta=theta)
    if rope_type != "yarn":
        raise PretrainedError(
            f"{origin}: RoPE type {rope_type!r} is not supported, expected default or yarn"
        )
    if parameters.get("mscale") or parameters.get("truncate") is False:
        raise PretrainedError(f"{origin}: YaRN with mscale or without truncation is not supported")
    longest = config.get("max_position_embeddings")
    original = parameters.get("original_max_position_embeddings") or longest
    factor = parameters.get("factor") or (original and longest and longest / original)
    if not original or not factor:
        raise PretrainedError(
            f"{origin}: config.json has no YaRN factor or no original_max_position_embeddings"
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
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    origin: str = "qwen3",
) -> Qwen3:
    """Builds the decoder of a dense Qwen3 config.json.

    Args:
        origin: where the config comes from, for error messages.
    """
    if config.get("model_type") != "qwen3":
        raise PretrainedError(
            f"{origin}: model_type is {config.get('model_type')!r}, expected 'qwen3' (dense Qwen3)"
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
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if num_heads % num_kv_heads:
        raise PretrainedError(
            f"{origin}: config.json has {num_heads} heads, which is not divisible by its "
            f"{num_kv_heads} key-value heads"
        )
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if (
        config.get("use_sliding_window")
        or config.get("attention_bias")
        or layer_types != {"full_attention"}
    ):
        raise PretrainedError(
            f"{origin}: sliding windows and attention biases are not supported; "
            "no released dense Qwen3 has them"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise PretrainedError(
            f"{origin}: activation {config['hidden_act']!r} is not supported, expected silu"
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
    """The layout of a Whisper with or without its output layer, or of a bare encoder."""
    prefixes, keys = ("model.encoder.", "encoder.", ""), source.keys()
    prefix = next((prefix for prefix in prefixes if f"{prefix}conv1.weight" in keys), prefixes[0])
    return layouts.hf_whisper(prefix)


def load_whisper(folder: str | os.PathLike, tree: dict) -> dict:
    """Loads the encoder of a Whisper folder with the shapes, dtypes and shardings of `tree`."""
    source = SafetensorsSource(folder)
    return engine.load(
        source, _whisper_layout(source), tree, layouts.HF_WHISPER_IGNORED, f"{folder}/config.json"
    )


def open_whisper(folder: str | os.PathLike, leaves: dict) -> dict[str, engine.StoredLeaf]:
    """Like `load_whisper`, but {path: leaf} in the file's dtype: checked now, read on demand."""
    source = SafetensorsSource(folder)
    return engine.open_leaves(
        source, _whisper_layout(source), leaves, layouts.HF_WHISPER_IGNORED, f"{folder}/config.json"
    )


def load_qwen3(folder: str | os.PathLike, tree: dict) -> dict:
    """Loads a Qwen3 folder, without LoRA, with the shapes, dtypes and shardings of `tree`."""
    source = SafetensorsSource(folder)
    ignore = tied_head(source, "") if "lm_head" not in tree else ()
    return engine.load(source, layouts.hf_qwen3(), tree, ignore, f"{folder}/config.json")


def open_qwen3(folder: str | os.PathLike, leaves: dict) -> dict[str, engine.StoredLeaf]:
    """Like `load_qwen3`, but {path: leaf} in the file's dtype: checked now, read on demand."""
    source = SafetensorsSource(folder)
    ignore = tied_head(source, "") if "lm_head" not in leaves else ()
    return engine.open_leaves(source, layouts.hf_qwen3(), leaves, ignore, f"{folder}/config.json")


def tied_head(source: TensorSource, prefix: str) -> tuple[str, ...]:
    """Patterns of tensors to ignore with tied embeddings: the copy of them that some files contain.

    Raises:
        ConversionError: the first or last 256 rows differ from the embeddings.
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
                f"{source.path}: tensor {head} differs from the embeddings, "
                "but config.json has tie_word_embeddings true"
            )
    return (re.escape(head),)


def fingerprint(folder: str | os.PathLike) -> str:
    """A content hash of a pretrained model, to detect that it changed.

    Covers all of config.json, and the size, first and last MiB of each safetensors file (the first
    includes the tensor table). Hashing all weights would take minutes at every start.
    """
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
