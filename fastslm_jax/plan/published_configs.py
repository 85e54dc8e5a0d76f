"""Sizes of the base models of the configs, so that plans need no download.

Copied from their config.json on the Hugging Face Hub.
"""

import json
import pathlib

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "openai/whisper-large-v3": {
        "model_type": "whisper",
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
    },
    "openai/whisper-base": {
        "model_type": "whisper",
        "d_model": 512,
        "encoder_layers": 6,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
    },
    "Qwen/Qwen3-4B-Instruct-2507": {
        **QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "max_position_embeddings": 262_144,
        "rope_theta": 5e6,
    },
    "Qwen/Qwen3-1.7B": {
        **QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen/Qwen3-0.6B": {
        **QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
}


def local(name: str, folder: pathlib.Path) -> str:
    """Writes the config.json of a known base model under `folder` and returns its folder.

    Returns the name itself if it is a local folder or not in CONFIGS.
    """
    if name not in CONFIGS or pathlib.Path(name).is_dir():
        return name
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    return str(target)
