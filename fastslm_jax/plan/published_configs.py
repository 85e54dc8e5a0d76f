"""Sizes of the public bases that the full-size configs name, as in their config.json on the Hugging Face hub: a plan needs no
download."""

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
    """A base's name, or for one of CONFIGS a folder inside `folder` with its config.json and nothing else."""
    if name not in CONFIGS or pathlib.Path(name).is_dir():
        return name
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(CONFIGS[name]))
    return str(target)
