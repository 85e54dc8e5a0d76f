"""Sizes of the base models of the full-size configs, so that plans need no download.

Copied from their config.json on the Hugging Face Hub.
"""

import json
import pathlib

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
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_theta": 5e6,
        "tie_word_embeddings": True,
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
