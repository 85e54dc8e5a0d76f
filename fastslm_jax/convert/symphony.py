"""config.json of the authors' Hugging Face folders (model_type "symphony").

Their tensors are taken to have the names of the released state_dict.
"""

import pathlib
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from fastslm_jax import config_schema, schema
from fastslm_jax.weights import layouts
from fastslm_jax.weights.tensors import ConversionError

MODEL_TYPE = "symphony"
IGNORED = {  # keys that say nothing about the model's computation
    *("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version"),
    *("dtype", "torch_dtype", "use_cache", "tie_word_embeddings", "low_resource"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_attn_implementation_autoset"),
}


class _Encoder(schema.Schema):
    n_mels: PositiveInt
    n_ctx: PositiveInt
    n_state: PositiveInt
    n_head: PositiveInt
    n_layer: PositiveInt
    stage_tokens: Annotated[list[config_schema.Slots], Field(min_length=1, max_length=8)]
    compression_size: config_schema.Slots


class _Symphony(schema.Schema):
    encoder_config: _Encoder
    llm_config: dict[str, Any]
    lora_r: Annotated[config_schema.Rank, Field(gt=0)]
    lora_a: config_schema.NotNegative
    llm_modules: tuple[str, ...] = Field(layouts.LORA_TARGETS, strict=False)


def metadata(config: dict, path: pathlib.Path) -> dict:
    """A symphony config.json in the form of `export --layout=released`.

    Args:
        path: of the config.json, for error messages.

    Raises:
        ConversionError: a key is missing, invalid or unknown.
    """
    checked = schema.check(_Symphony, config, path, ConversionError)
    known = {"": _Symphony, "encoder_config.": _Encoder}
    unknown = sorted(
        f"{prefix}{key}"
        for prefix, kind in known.items()
        for key in (config["encoder_config"] if prefix else config)
        if key not in kind.model_fields and key not in IGNORED
    )
    if unknown:
        raise ConversionError(
            f"{path}: unknown keys {', '.join(unknown)}; remove those that do not change the model"
        )
    if set(checked.llm_modules) != set(layouts.LORA_TARGETS):
        raise ConversionError(
            f"{path}: llm_modules is {', '.join(checked.llm_modules)}, expected "
            f"{', '.join(layouts.LORA_TARGETS)}"
        )
    encoder = checked.encoder_config
    return {
        "speech_dim": encoder.n_state,
        "encoder_layers": encoder.n_layer,
        "encoder_heads": encoder.n_head,
        "n_mels": encoder.n_mels,
        "n_audio_ctx": encoder.n_ctx,
        "stage_tokens": encoder.stage_tokens,
        "compression_size": encoder.compression_size,
        "detail_recovery_layers": 2,
        "llm": checked.llm_config,
        "lora": {"r": checked.lora_r, "alpha": checked.lora_a},
    }
