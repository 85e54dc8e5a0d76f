"""Opens the authors' state_dict: a file, or a folder that may have config.json and a tokenizer.

Folders are those of `export --layout=released` and of the authors (see `symphony`).

Sizes come from the tensors. The language model's heads, RoPE and tokenizer are not in the tensors:
they come from `llm` (hub id or folder) or from the folder. A config.json must match the tensors.
"""

import math
import os
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax import config_schema, schema
from fastslm_jax.convert import stored, symphony
from fastslm_jax.convert.stored import Stored
from fastslm_jax.errors import UserError
from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.training import experiment
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import ConversionError, TensorSource, file_format, open_file

WHISPER_LAYERS = {384: 4, 512: 6, 768: 12, 1024: 24, 1280: 32}  # width: number of layers


class ReleasedLora(schema.Schema):
    """LoRA settings in a `ReleasedConfig`."""

    r: config_schema.Rank | None = None
    alpha: config_schema.NotNegative | None = None
    dropout: config_schema.BelowOne | None = None


class ReleasedConfig(schema.Schema):
    """config.json beside a released state_dict, from `export --layout=released`."""

    llm: dict[str, Any]
    speech_dim: int | None = None
    encoder_layers: int | None = None
    encoder_heads: int | None = None
    n_mels: int | None = None
    n_audio_ctx: int | None = None
    stage_tokens: list[int] | None = None
    compression_size: int | None = None
    detail_recovery_layers: int | None = None
    lora: ReleasedLora = ReleasedLora()
    dtype: config_schema.Dtype | None = None
    audio_padding: config_schema.AudioPadding | None = None


def open_released(
    path: str | os.PathLike,
    *,
    llm: str | None = None,
    lora_alpha: float | None = None,
    strict: bool = True,
) -> Stored:
    """Opens a released state_dict.

    Args:
        llm: hub id or folder of the language model.
        lora_alpha: default: from config.json, or 64.
        strict: False skips the check of names and shapes and opens no leaves.
    """
    if lora_alpha is not None and not 0 <= lora_alpha < math.inf:
        raise UserError(f"--lora_alpha={lora_alpha}: expected a finite number, such as 64")
    path = pathlib.Path(path)
    source = _open_state_dict(path)
    folder = path if path.is_dir() else path.parent
    metadata = _read_metadata(folder)
    llm_config, tokenizer = _find_llm(path, folder, metadata, llm)
    sizes = _sizes_of(source)
    if llm is not None:  # rows may have been appended for the added tokens
        rows = max(llm_config.get("vocab_size") or 0, sizes["vocab_rows"])
        llm_config = llm_config | {"vocab_size": rows}
    _check_sizes(sizes, metadata, folder / "config.json", source)
    config = _config_of(sizes, metadata, source, lora_alpha)
    whisper_config = {
        "d_model": sizes["speech_dim"],
        "encoder_layers": sizes["encoder_layers"],
        "encoder_attention_heads": metadata.get("encoder_heads", sizes["encoder_heads"]),
        "encoder_ffn_dim": sizes["mlp_dim"],
        "num_mel_bins": sizes["n_mels"],
        "max_source_positions": sizes["n_audio_ctx"],
    }
    origin = str(llm or folder)
    model = experiment.make_model(
        config.model,
        whisper_config,
        llm_config,
        whisper_origin=str(path),
        llm_origin=origin,
    )
    layout = layouts.released(len(sizes["stage_tokens"]), sizes["detail_recovery_layers"])
    leaves = {}
    if strict:
        tied = model.llm.tied_embeddings
        ignore = pretrained.tied_head(source, layouts.RELEASED_LLM) if tied else ()
        sizes_from = f"the tensors and {origin}'s config.json"
        leaves = engine.open_leaves(source, layout, stored.param_shapes(model), ignore, sizes_from)
        stored.set_dtypes(config, leaves, metadata.get("dtype"))
    return Stored(
        "released", path, config, model, leaves, llm_config, tokenizer, source=source, layout=layout
    )


def _open_state_dict(path: pathlib.Path) -> TensorSource:
    if path.is_dir() and not list(path.glob("*.safetensors*")):
        files = [file for file in sorted(path.iterdir()) if file_format(file)]
        if len(files) != 1:
            raise ConversionError(
                f"{path}: contains no .safetensors file and {len(files)} PyTorch files; give the "
                "path of one file"
            )
        path = files[0]
    return open_file(path)


def _read_metadata(folder: pathlib.Path) -> dict:
    """The folder's config.json; {} if it is not from `export --layout=released` or the authors."""
    metadata = pretrained.read_config(folder) if (folder / "config.json").is_file() else {}
    if metadata.get("model_type") == symphony.MODEL_TYPE:
        return symphony.metadata(metadata, folder / "config.json")
    if not isinstance(metadata.get("llm"), dict):
        return {}
    checked = schema.check(ReleasedConfig, metadata, folder / "config.json", ConversionError)
    return checked.model_dump(exclude_none=True)


def _find_llm(
    path: pathlib.Path, folder: pathlib.Path, metadata: dict, llm: str | None
) -> tuple[dict, pathlib.Path]:
    """config.json and tokenizer folder of the language model."""
    if llm is not None:
        llm_folder = pretrained.resolve(llm, weights=False)
        return pretrained.read_config(llm_folder), llm_folder
    if not metadata:
        raise UserError(
            f"{path}: the tensors do not determine the language model's heads; specify the model "
            "with --llm=ID|DIR"
        )
    for tokenizer in (folder / "tokenizer", folder):
        if (tokenizer / "tokenizer_config.json").is_file():
            return metadata["llm"], tokenizer
    raise UserError(f"{folder}: has no tokenizer/; specify the language model with --llm=ID|DIR")


def _sizes_of(source: TensorSource) -> dict:
    """All sizes that the tensors determine."""
    keys = source.keys()

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in keys:
            raise ConversionError(
                f"{source.path}: missing tensor {key}; is this a released FastSLM?"
            )
        if len(source.shape(key)) != rank:
            raise ConversionError(
                f"{source.path}: tensor {key} has shape {source.shape(key)}, "
                f"expected {rank} dimensions"
            )
        return source.shape(key)

    def count(pattern: str, first: int = 0) -> int:
        numbers = {int(match[1]) for key in keys if (match := re.match(pattern, key))}
        return max(numbers) + 1 - first if numbers else 0

    width, num_mels, _ = shape("encoder.whisper.conv1.weight", 3)
    head_dim = HFQFormer.head_dim
    if width % head_dim:
        raise ConversionError(
            f"{source.path}: the encoder width {width} is not a multiple of the head dimension "
            f"{head_dim}"
        )
    num_stages = count(r"encoder\.compressor(\d{1,6})\.", first=1)
    lora_a = f"{layouts.RELEASED_LLM}model.layers.0.self_attn.q_proj.lora_A.default.weight"
    return {
        "speech_dim": width,
        "n_mels": num_mels,
        "encoder_heads": width // head_dim,
        "encoder_layers": count(r"encoder\.whisper\.blocks\.(\d{1,6})\."),
        "mlp_dim": shape("encoder.whisper.blocks.0.mlp.0.weight", 2)[0],
        "n_audio_ctx": shape("encoder.whisper.positional_embedding", 2)[0],
        "stage_tokens": tuple(
            shape(f"encoder.compressor{stage}.query", 3)[1] for stage in range(1, num_stages + 1)
        ),
        "compression_size": shape("encoder.compressor.query", 3)[1],
        "detail_recovery_layers": count(r"encoder\.out_attn\.(\d{1,6})\."),
        "lora_rank": shape(lora_a, 2)[0],
        "vocab_rows": shape(f"{layouts.RELEASED_LLM}model.embed_tokens.weight", 2)[0],
    }


def _check_sizes(
    sizes: dict, metadata: dict, config_path: pathlib.Path, source: TensorSource
) -> None:
    """Compares the sizes with config.json or the published models.

    Needed because missing last layers leave no gap in the tensor names.
    """
    if metadata:
        names = (name for name in sizes if name in metadata and name != "encoder_heads")
        expected = {name: metadata[name] for name in names}
        expected["lora_rank"] = metadata.get("lora", {}).get("r", sizes["lora_rank"])
        origin = str(config_path)
    else:
        width = sizes["speech_dim"]
        expected = {
            "detail_recovery_layers": 2,
            "encoder_layers": WHISPER_LAYERS.get(width, sizes["encoder_layers"]),
        }
        origin = f"a FastSLM of width {width}"
    for name, value in expected.items():
        value = tuple(value) if isinstance(value, list) else value
        if value != sizes[name]:
            raise ConversionError(
                f"{source.path}: the tensors have {name} {sizes[name]}, {origin} has {value}"
            )


def _config_of(
    sizes: dict, metadata: dict, source: TensorSource, lora_alpha: float | None
) -> ConfigDict:
    config = config_lib.full_size()
    config.name = "imported"
    for name in ("stage_tokens", "compression_size", "detail_recovery_layers"):
        config.model[name] = sizes[name]
    config.model.audio_padding = metadata.get("audio_padding", "released")
    lora = metadata.get("lora", {})
    alpha = lora.get("alpha", config.model.lora.alpha) if lora_alpha is None else lora_alpha
    dropout = lora.get("dropout", config.model.lora.dropout)
    config.model.lora.update({"rank": sizes["lora_rank"], "alpha": alpha, "dropout": dropout})
    config_lib.check(config, f"{source.path}: config")
    return config
