"""config.json of pretrained models: published files load; what is not understood is refused."""

import json

import pytest

from fastslm_jax.models.decoder import RoPE
from fastslm_jax.weights import pretrained
from fastslm_jax.weights.pretrained import PretrainedError

# The fields of the published files, at the size of Qwen3-4B and Whisper-large-v3.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
WHISPER = {
    "_name_or_path": "openai/whisper-large-v3",
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "apply_spec_augment": False,
    "architectures": ["WhisperForConditionalGeneration"],
    "attention_dropout": 0.0,
    "begin_suppress_tokens": [220, 50257],
    "bos_token_id": 50257,
    "classifier_proj_size": 256,
    "d_model": 1280,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 32,
    "decoder_start_token_id": 50258,
    "dropout": 0.0,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 32,
    "eos_token_id": 50257,
    "forced_decoder_ids": [[1, None], [2, 50359]],
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "mask_feature_length": 10,
    "mask_feature_min_masks": 0,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_time_prob": 0.05,
    "max_length": 448,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "median_filter_width": 7,
    "model_type": "whisper",
    "num_hidden_layers": 32,
    "num_mel_bins": 128,
    "pad_token_id": 50256,
    "scale_embedding": False,
    "suppress_tokens": [],
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "use_weighted_layer_sum": False,
    "vocab_size": 51866,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e6}
WITHOUT_ROPE = {name: value for name, value in QWEN3.items() if not name.startswith("rope_")}


def qwen3(change):
    return pretrained.decoder_from_config(QWEN3 | change, origin="folder")


def test_published_files():
    llm, encoder = qwen3({}), pretrained.whisper_from_config(WHISPER)
    assert (llm.width, llm.num_layers, llm.num_heads, llm.num_kv_heads) == (2560, 36, 32, 8)
    assert (llm.head_dim, llm.mlp_dim, llm.epsilon, llm.rope.theta) == (128, 9728, 1e-6, 1e6)
    assert (encoder.width, encoder.num_layers, encoder.num_heads) == (1280, 32, 20)
    assert (encoder.mlp_dim, encoder.num_mels, encoder.max_positions) == (5120, 128, 1500)


# Qwen2.5-0.5B-Instruct, SmolLM2-135M-Instruct and Llama-3.2-1B-Instruct.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
FAMILIES = {  # config: heads, key-value heads, head_dim, theta, RoPE, q and k norms, q k v biases
    "qwen3": (QWEN3, (32, 8, 128, 1e6, "default", True, False)),
    "qwen2": (QWEN2, (14, 2, 64, 1e6, "default", False, True)),
    "smollm2": (SMOLLM2, (9, 3, 64, 1e5, "default", False, False)),
    "llama": (LLAMA, (32, 8, 64, 5e5, "llama3", False, False)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    config, expected = FAMILIES[name]
    llm = pretrained.decoder_from_config(config)
    sizes = (llm.num_heads, llm.num_kv_heads, llm.head_dim)
    assert (*sizes, llm.rope.theta, llm.rope.kind, llm.qk_norm, llm.qkv_bias) == expected


def test_llama_without_key_value_heads_has_one_for_each_head():
    llm = pretrained.decoder_from_config(SMOLLM2 | {"num_key_value_heads": None})
    assert (llm.num_kv_heads, llm.head_dim) == (9, 64)
    with pytest.raises(PretrainedError, match="hidden_size 576 / 10 heads is not an even head"):
        pretrained.decoder_from_config(
            SMOLLM2 | {"num_attention_heads": 10, "num_key_value_heads": 5}
        )


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_every_field_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")().to_dict()
    assert pretrained.decoder_from_config(json.loads(json.dumps(config))).width == 4096
    config = transformers.WhisperConfig().to_dict()
    assert pretrained.whisper_from_config(json.loads(json.dumps(config))).width == 384


YARN_ROPE = RoPE(5e6, 4.0, 32768, kind="yarn")
ROPES = {
    "transformers 4": ({"rope_theta": 5e6}, RoPE(5e6)),
    "transformers 4, YaRN": (
        {"rope_theta": 5e6, "rope_scaling": YARN},
        YARN_ROPE,
    ),
    "transformers 5": ({"rope_parameters": PLAIN}, RoPE(5e6)),
    "transformers 5, YaRN": ({"rope_parameters": PLAIN | YARN}, YARN_ROPE),
    "both": ({"rope_parameters": PLAIN, "rope_scaling": YARN}, YARN_ROPE),
    "both, and equal": (
        {"rope_parameters": PLAIN | YARN, "rope_scaling": YARN},
        YARN_ROPE,
    ),
    "three": (
        {"rope_theta": 5e6, "rope_parameters": PLAIN, "rope_scaling": {"type": "yarn"} | YARN},
        YARN_ROPE,
    ),
    "by layer type": ({"rope_parameters": {"full_attention": PLAIN}}, RoPE(5e6)),
    "by layer type, YaRN": (
        {"rope_parameters": {"full_attention": PLAIN | YARN | {"beta_fast": 16}}},
        RoPE(5e6, 4.0, 32768, beta_fast=16.0, kind="yarn"),
    ),
    "YaRN of the whole length": (
        {"rope_theta": 5e6, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
        RoPE(5e6, 2.0, 40960, kind="yarn"),
    ),
    "Llama 3": (
        {"rope_theta": 5e6, "rope_scaling": LLAMA3},
        RoPE(5e6, 32.0, 8192, low_frequency_factor=1.0, high_frequency_factor=4.0, kind="llama3"),
    ),
    "null": ({"rope_theta": 5e6, "rope_scaling": None, "rope_parameters": None}, RoPE(5e6)),
    "none": ({}, RoPE(10_000.0)),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope(name):
    fields, expected = ROPES[name]
    assert pretrained.decoder_from_config(WITHOUT_ROPE | fields).rope == expected


BAD_ROPES = {
    "two values of theta": (
        {"rope_parameters": PLAIN},
        r"rope_theta has rope_theta 1000000, but 5000000.0 is given as well",
    ),
    "two factors": (
        {"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}},
        "rope_scaling has factor 2.0, but 4.0 is given as well",
    ),
    "two types": (
        {"rope_scaling": YARN | {"type": "linear"}},
        "rope_scaling has rope_type 'linear', but 'yarn' is given as well",
    ),
    "by two layer types": (
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
        "rope_theta has|full_attention is not supported",
    ),
    "another type": ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, 'is "longrope"'),
    "no high_freq_factor": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": None}},
        "RoPE of type llama3 has no high_freq_factor",
    ),
    "equal frequency factors": (
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
        "high_freq_factor 4.0 must be larger than low_freq_factor 4.0",
    ),
    "factor without a type": ({"rope_scaling": {"factor": 4.0}}, "factor 4.0 but no rope_type"),
    "text": ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn", should be a valid dictionary'),
    "list": ({"rope_parameters": [1]}, r"rope_parameters is \[1\], should be a valid dictionary"),
    "layer type of text": ({"rope_parameters": {"full_attention": "x"}}, "not an object of RoPE"),
    "factor of text": ({"rope_scaling": YARN | {"factor": "x"}}, 'factor is "x", should be'),
    "factor below 1": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5, should be"),
    "infinite factor": ({"rope_scaling": YARN | {"factor": float("inf")}}, "finite number"),
    "theta of text": ({"rope_theta": "x"}, 'rope_theta is "x", should be a valid number'),
    "theta of a list": ({"rope_theta": []}, r"rope_theta is \[\], should be a valid number"),
    "theta 0": ({"rope_theta": 0}, "rope_theta is 0, should be greater than 1"),
    "partial": ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "mscale": ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale is 1.0"),
    "no truncation": ({"rope_scaling": YARN | {"truncate": False}}, "truncate is false"),
    "unknown": ({"rope_scaling": YARN | {"mrope_section": [1]}}, "mrope_section is not supported"),
    "no factor": (
        {"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": None},
        "has no YaRN factor",
    ),
}


@pytest.mark.parametrize("name", BAD_ROPES)
def test_rope_that_is_not_understood(name):
    change, message = BAD_ROPES[name]
    with pytest.raises(PretrainedError, match=f"folder/config.json: .*({message})"):
        qwen3(change)


BAD_FIELDS = [
    *[("rms_norm_eps", value) for value in (None, [], "1e-6", True, 0, -1e-6, float("nan"))],
    *[("hidden_size", value) for value in (None, "32", 32.0, 0, -1, 10**9, True, [32])],
    *[("num_hidden_layers", value) for value in (0, 10**9, 10**400, "x")],
    *[("head_dim", value) for value in (None, 127, 0, 2.5)],
    ("num_key_value_heads", None),
    ("mlp_bias", True),
    ("pretraining_tp", 2),
    ("rope_interleaved", True),
    ("use_mrope", True),
    *[("layer_types", value) for value in (5, "x", [5], ["sliding_attention"], [])],
    *[("torch_dtype", value) for value in ("float7", 5, "int8")],
    *[("dtype", value) for value in ("float8_e4m3fn", {})],
    ("max_position_embeddings", -5),
    ("tie_word_embeddings", 1),
    ("attention_bias", True),
    ("use_sliding_window", True),
    ("hidden_act", "gelu"),
    ("model_type", "qwen3_moe"),
    ("quantization_config", {"quant_method": "fp8"}),
    ("partial_rotary_factor", 0.5),
    ("logit_scale", 0.1),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=str)
def test_fields_that_are_not_understood_are_named(name, value):
    if value == []:
        value = [] if name != "layer_types" else ["full_attention"]  # of 36 layers
    with pytest.raises(PretrainedError, match=f"^folder/config.json: .*{name}"):
        qwen3({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "32 heads, which is not divisible by its 3 key-value heads"),
        ({"vocab_size": None}, "vocab_size is null, should be a valid integer"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(PretrainedError, match=message):
        qwen3(change)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("d_model", 97),
        ("d_model", "384"),
        ("encoder_layers", None),
        ("num_mel_bins", 10_000),
        ("activation_function", "relu"),
        ("scale_embedding", True),
        ("use_weighted_layer_sum", True),
        ("torch_dtype", "float7"),
        ("model_type", "wav2vec2"),
        ("conv_bias", False),
    ],
)
def test_whisper_fields_that_are_not_understood_are_named(name, value):
    with pytest.raises(PretrainedError, match=f"^whisper/config.json: .*{name}"):
        pretrained.whisper_from_config(WHISPER | {name: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfa{}", "not UTF-8|not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_files_that_are_not_json(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PretrainedError, match=message) as raised:
        pretrained.read_config(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PretrainedError, match=r"config\.json: No such file"):
        pretrained.read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(PretrainedError, match=r"config\.json: Is a directory"):
        pretrained.read_config(tmp_path)
