"""Schemas of the config.json of pretrained models, and the RoPE settings in them.

A field that is not read must be listed as harmless. Any other field could change the numbers of the
model and is an error that names it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from fastslm_jax import schema
from fastslm_jax.errors import UserError
from fastslm_jax.models.decoder import RoPE

Width = Annotated[int, Field(ge=1, le=1 << 18)]
Count = Annotated[int, Field(ge=1, le=1024)]  # layers, heads
Positions = Annotated[int, Field(ge=1, le=1 << 30)]
Dtype = Literal["float32", "float16", "bfloat16", "float64", "auto"]

# Fields of every Hugging Face config that do not change the numbers of inference or of training
# with frozen weights: descriptions, and settings of generation and of classifiers.
HARMLESS = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path architectures attn_implementation auto_map
    finetuning_task name_or_path tokenizer_class transformers_version unsloth_fixed unsloth_version
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    is_decoder is_encoder_decoder output_attentions output_hidden_states return_dict use_cache
    chunk_size_feed_forward id2label label2id num_labels prefix problem_type task_specific_params
    tf_legacy_loss torchscript use_bfloat16 attention_dropout initializer_range
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_decoder_ids forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    top_k top_p typical_p
    """.split()
)


class PretrainedError(UserError):
    """An unusable pretrained model. Names the folder, the problem and the fix."""


class ModelConfig(schema.Schema):
    """Base of the schemas of config.json. Null is a value, and must be allowed by the field.

    harmless: fields that are not read and do not change the numbers.
    """

    harmless: ClassVar[frozenset[str]] = frozenset()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return fields


class WhisperConfig(ModelConfig):
    """config.json of a Whisper. The decoder is not used."""

    harmless: ClassVar[frozenset[str]] = HARMLESS | frozenset(
        """
        activation_dropout apply_spec_augment classifier_proj_size decoder_attention_heads
        decoder_ffn_dim decoder_layerdrop decoder_layers dropout encoder_layerdrop init_std
        mask_feature_length mask_feature_min_masks mask_feature_prob mask_time_length
        mask_time_min_masks mask_time_prob max_target_positions median_filter_width
        num_hidden_layers tie_word_embeddings vocab_size
        """.split()
    )

    model_type: Literal["whisper"] = "whisper"
    d_model: Annotated[int, Field(ge=4, le=1 << 18, multiple_of=2)]
    encoder_layers: Count
    encoder_attention_heads: Count
    encoder_ffn_dim: Width
    num_mel_bins: Annotated[int, Field(ge=1, le=256)]
    max_source_positions: Annotated[int, Field(ge=1, le=1 << 20)]
    activation_function: Literal["gelu"] = "gelu"
    scale_embedding: Literal[False] = False
    use_weighted_layer_sum: Literal[False] = False
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None


class RopeConfig(ModelConfig):
    """rope_parameters (transformers 5), rope_scaling and rope_theta (transformers 4) as one."""

    rope_type: Literal["default", "yarn", "llama3"] = "default"
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    factor: Annotated[float, Field(ge=1)] | None = None
    original_max_position_embeddings: Positions | None = None
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    low_freq_factor: Annotated[float, Field(gt=0)] | None = None
    high_freq_factor: Annotated[float, Field(gt=0)] | None = None
    truncate: Literal[True] = True
    mscale: Literal[0] | None = None
    mscale_all_dim: Literal[0] | None = None


class DecoderConfig(ModelConfig):
    """config.json of a dense Qwen3, Qwen2 (also 2.5) or Llama (also SmolLM2)."""

    harmless: ClassVar[frozenset[str]] = HARMLESS | frozenset(
        ["is_llama_config", "max_window_layers", "sliding_window", "transformers.js_config"]
    )

    model_type: Literal["qwen3", "qwen2", "llama"]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    hidden_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] | None = None
    intermediate_size: Width
    max_position_embeddings: Positions | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    pretraining_tp: Literal[1] = 1
    rope_interleaved: Literal[False] = False
    use_mrope: Literal[False] = False
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None
    rope_theta: Any = None  # these three are checked as one `RopeConfig`
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None

    def attention_sizes(self, where: str) -> tuple[int, int]:
        """The number of key-value heads and the head dimension, with the defaults of each family.

        Raises:
            PretrainedError: a size is missing, or they do not fit.
        """
        heads, kv_heads, head_dim = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        )
        if kv_heads is None:
            if self.model_type != "llama":
                raise PretrainedError(f"{where}: num_key_value_heads is missing")
            kv_heads = heads
        if heads % kv_heads:
            raise PretrainedError(
                f"{where}: {heads} heads, which is not divisible by its {kv_heads} key-value heads"
            )
        if head_dim is None:
            if self.model_type == "qwen3":
                raise PretrainedError(f"{where}: head_dim is missing")
            head_dim, rest = divmod(self.hidden_size, heads)
            if rest or head_dim % 2:
                raise PretrainedError(
                    f"{where}: hidden_size {self.hidden_size} / {heads} heads is not an even head "
                    "dimension, and head_dim is missing"
                )
        return kv_heads, head_dim

    def rope(self, where: str) -> RoPE:
        """The position embedding.

        Raises:
            PretrainedError: the settings are not supported, or contradict each other.
        """
        rope = check_config(RopeConfig, self._merged_rope(where), f"{where}: RoPE")
        if rope.rope_type == "default":
            if (rope.factor or 1) != 1:
                raise PretrainedError(f"{where}: RoPE has factor {rope.factor} but no rope_type")
            return RoPE(theta=rope.rope_theta)
        if rope.rope_type == "llama3":
            return _llama3(rope, where)
        longest = self.max_position_embeddings
        original = rope.original_max_position_embeddings or longest
        factor = rope.factor or (original and longest and longest / original)
        if not original or not factor:
            raise PretrainedError(
                f"{where}: has no YaRN factor or no original_max_position_embeddings"
            )
        if rope.beta_fast <= rope.beta_slow:
            raise PretrainedError(
                f"{where}: beta_fast {rope.beta_fast} must be larger than beta_slow "
                f"{rope.beta_slow}"
            )
        return RoPE(
            theta=rope.rope_theta,
            factor=float(factor),
            original_max_positions=original,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            attention_factor=rope.attention_factor,
            kind="yarn",
        )

    def _merged_rope(self, where: str) -> dict[str, Any]:
        """The RoPE settings of all fields as one object."""
        merged: dict[str, Any] = {}
        theta = {"rope_theta": self.rope_theta}
        for name in ("rope_parameters", "rope_scaling", "rope_theta"):
            fields = theta if name == "rope_theta" else getattr(self, name) or {}
            if set(fields) == {"full_attention"}:  # by layer type
                fields = fields["full_attention"]
            if not isinstance(fields, Mapping):
                raise PretrainedError(f"{where}: {name} is not an object of RoPE settings")
            _merge(merged, fields, name, where)
        return merged


def _llama3(rope: RopeConfig, where: str) -> RoPE:
    names = (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    )
    if missing := [name for name in names if getattr(rope, name) is None]:
        raise PretrainedError(f"{where}: RoPE of type llama3 has no {missing[0]}")
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise PretrainedError(
            f"{where}: high_freq_factor {rope.high_freq_factor} must be larger than "
            f"low_freq_factor {rope.low_freq_factor}"
        )
    return RoPE(
        theta=rope.rope_theta,
        factor=rope.factor,
        original_max_positions=rope.original_max_position_embeddings,
        low_frequency_factor=rope.low_freq_factor,
        high_frequency_factor=rope.high_freq_factor,
        kind="llama3",
    )


def _merge(merged: dict[str, Any], fields: Mapping, origin: str, where: str) -> None:
    """Adds the fields that are set; those that are there already must be equal."""
    for name, value in fields.items():
        name = "rope_type" if name == "type" else name
        if value is None or (name == "rope_type" and value == "default"):
            continue
        if merged.setdefault(name, value) != value:
            raise PretrainedError(
                f"{where}: {origin} has {name} {value!r}, but {merged[name]!r} is given as well"
            )


def check_config(model: type[schema.Checked], config: Mapping, where: str) -> schema.Checked:
    """Checks a config.json.

    Args:
        model: a `ModelConfig`.
        where: the file, for error messages.

    Raises:
        PretrainedError: a field is missing, has a value that is not supported, or is unknown.
    """
    checked = schema.check(model, config, where, PretrainedError)
    if unknown := sorted(set(config) - set(model.model_fields) - model.harmless):
        raise PretrainedError(
            f"{where}: {unknown[0]} is not supported; remove it if it does not change the model"
        )
    return checked
