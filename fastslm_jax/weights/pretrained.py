"""Whisper and language models from Hugging Face folders or hub ids.

A folder has config.json, safetensors files and, for the language model, a tokenizer. All sizes are
read from config.json.
"""

import hashlib
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fastslm_jax import schema
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.weights import engine, layouts
from fastslm_jax.weights.model_configs import (
    DecoderConfig,
    PretrainedError,
    WhisperConfig,
    check_config,
)
from fastslm_jax.weights.resized_table import ResizedTable
from fastslm_jax.weights.tensors import ConversionError, SafetensorsSource, TensorSource


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
    """The folder's config.json.

    Raises:
        PretrainedError: there is none, or it is not a JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        config = schema.parse_json(path.read_bytes())
    except OSError as error:
        raise PretrainedError(
            f"{path}: {error.strerror}; the folder of a pretrained model must contain it"
        ) from None
    except ValueError as error:
        raise PretrainedError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise PretrainedError(f"{path}: not a JSON object")
    return config


def whisper_from_config(
    config: dict, *, dtype: DTypeLike = jnp.float32, remat: str = "none", origin: str = "whisper"
) -> WhisperEncoder:
    """Builds the encoder of a Whisper config.json of any size.

    Args:
        origin: where the config comes from, for error messages.

    Raises:
        PretrainedError: a field is missing, unknown, or has a value that is not supported.
    """
    where = f"{origin}/config.json"
    fields = check_config(WhisperConfig, config, where)
    if fields.d_model % fields.encoder_attention_heads:
        raise PretrainedError(
            f"{where}: d_model is {fields.d_model}, which is not divisible by its "
            f"{fields.encoder_attention_heads} heads"
        )
    return WhisperEncoder(
        fields.d_model,
        fields.encoder_layers,
        fields.encoder_attention_heads,
        fields.encoder_ffn_dim,
        fields.num_mel_bins,
        fields.max_source_positions,
        remat=remat,
        dtype=dtype,
    )


def decoder_from_config(
    config: dict,
    *,
    lora: LoRA = LoRA(),
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    origin: str = "llm",
) -> Decoder:
    """Builds the decoder of a dense Qwen3, Qwen2 or Llama config.json.

    Args:
        origin: where the config comes from, for error messages.

    Raises:
        PretrainedError: a field is missing, unknown, or has a value that is not supported.
    """
    where = f"{origin}/config.json"
    fields = check_config(DecoderConfig, config, where)
    num_kv_heads, head_dim = fields.attention_sizes(where)
    if fields.layer_types and len(fields.layer_types) != fields.num_hidden_layers:
        raise PretrainedError(
            f"{where}: layer_types has {len(fields.layer_types)} entries, num_hidden_layers is "
            f"{fields.num_hidden_layers}"
        )
    return Decoder(
        fields.vocab_size,
        fields.hidden_size,
        fields.num_hidden_layers,
        fields.num_attention_heads,
        num_kv_heads,
        head_dim,
        fields.intermediate_size,
        rope=fields.rope(where),
        epsilon=fields.rms_norm_eps,
        tied_embeddings=fields.tie_word_embeddings,
        qk_norm=fields.model_type == "qwen3",
        qkv_bias=fields.model_type == "qwen2",
        lora=lora,
        remat=remat,
        dtype=dtype,
    )


def _whisper_layout(source: TensorSource) -> engine.Layout:
    """The layout of a Whisper with or without its output layer, or of a bare encoder."""
    prefixes, keys = ("model.encoder.", "encoder.", ""), source.keys()
    prefix = next((prefix for prefix in prefixes if f"{prefix}conv1.weight" in keys), prefixes[0])
    return layouts.hf_whisper(prefix)


def load_whisper(folder: str | os.PathLike, tree: dict, cut_positions: int = 0) -> dict:
    """Loads the encoder of a Whisper folder with the shapes, dtypes and shardings of `tree`.

    Args:
        cut_positions: the last positions of the files to leave out, for shorter windows.
    """
    source, layout = _open_whisper(folder, cut_positions)
    return engine.load(source, layout, tree, layouts.HF_WHISPER_IGNORED, f"{folder}/config.json")


def open_whisper(
    folder: str | os.PathLike, leaves: dict, cut_positions: int = 0
) -> dict[str, engine.StoredLeaf]:
    """Like `load_whisper`, but {path: leaf} in the file's dtype: checked now, read on demand."""
    source, layout = _open_whisper(folder, cut_positions)
    return engine.open_leaves(
        source, layout, leaves, layouts.HF_WHISPER_IGNORED, f"{folder}/config.json"
    )


def _open_whisper(
    folder: str | os.PathLike, cut_positions: int
) -> tuple[TensorSource | ResizedTable, engine.Layout]:
    source = SafetensorsSource(folder)
    layout = _whisper_layout(source)
    if not cut_positions:
        return source, layout
    rows = read_config(folder)["max_source_positions"]
    return ResizedTable(source, [layout["positions"].key], rows, -cut_positions), layout


def load_decoder(folder: str | os.PathLike, tree: dict, added_rows: int = 0) -> dict:
    """Loads a language model, without LoRA, with the shapes, dtypes and shardings of `tree`.

    Args:
        added_rows: rows of the embedding table that are not in the files; see `ResizedTable`.
    """
    source = SafetensorsSource(folder)
    ignore = tied_head(source, "") if "lm_head" not in tree else ()
    source = _with_rows(source, folder, added_rows)
    return engine.load(source, layouts.hf_decoder(), tree, ignore, f"{folder}/config.json")


def open_decoder(
    folder: str | os.PathLike, leaves: dict, added_rows: int = 0
) -> dict[str, engine.StoredLeaf]:
    """Like `load_decoder`, but {path: leaf} in the file's dtype: checked now, read on demand."""
    source = SafetensorsSource(folder)
    ignore = tied_head(source, "") if "lm_head" not in leaves else ()
    source = _with_rows(source, folder, added_rows)
    return engine.open_leaves(source, layouts.hf_decoder(), leaves, ignore, f"{folder}/config.json")


def _with_rows(
    source: TensorSource, folder: str | os.PathLike, added: int
) -> TensorSource | ResizedTable:
    if not added:
        return source
    keys = [layouts.hf_decoder()[name].key for name in ("embed_tokens", "lm_head")]
    return ResizedTable(source, keys, read_config(folder)["vocab_size"], added)


def tied_head(source: TensorSource, prefix: str) -> tuple[str, ...]:
    """Patterns of tensors to ignore with tied embeddings: the copy of them that some files contain.

    Raises:
        ConversionError: the copy differs from the embeddings.
    """
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if {head, embedding} <= source.keys():
        same = source.shape(head) == source.shape(embedding)
        rows = source.shape(head)[0] if same and source.shape(head) else 0
        if not same or not all(
            np.array_equal(source.read(head, part), source.read(embedding, part))
            for part in ((slice(first, first + 4096),) for first in range(0, rows, 4096))
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
