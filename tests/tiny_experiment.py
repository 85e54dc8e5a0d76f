"""An experiment that trains within seconds: random weights, noise recordings and a config."""

import json
import pathlib
import shutil

import jax
import numpy as np
import soundfile
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from fastslm_jax import config as config_lib
from fastslm_jax.training import experiment
from fastslm_jax.weights import engine, layouts

TOKENIZER = pathlib.Path(__file__).parents[1] / "assets/demo_llm"
WORDS = "anna bought two red lamps in vienna on friday".split()
WHISPER = {  # windows of 1 s
    "model_type": "whisper",
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 1,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 50,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": json.loads((TOKENIZER / "config.json").read_text())["vocab_size"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
LLM_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def get_config(folder: str) -> ConfigDict:
    """The config of a folder made by `write`; FOLDER/config.py gives the same to train.py."""
    config = config_lib.full_size()
    config.name = "tiny"
    config.base.whisper, config.base.llm = f"{folder}/whisper", f"{folder}/llm"
    config.model.update(
        {"stage_tokens": (4, 4), "compression_size": 3, "detail_recovery_layers": 1}
    )
    config.model.update({"remat": "none", "dtype": "float32", "base_dtype": "float32"})
    config.model.lora.update({"rank": 4, "dropout": 0.1})
    config.data.update({"workers": 0, "prefetch": 2})
    config.data.train.noise = config_lib.source(f"{folder}/train.jsonl", ("asr",))
    config.data.row.update({"windows": 4, "tokens": 128, "labels": 48})
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 2})
    config.global_batch_size, config.steps, config.loss_chunk = 2, 6, 16
    config.log_every, config.eval_every = 1, 1000
    config.checkpoint_every, config.keep_checkpoints = 2, 3
    return config


def write(folder: pathlib.Path) -> None:
    """Writes pretrained folders, 24 recordings of 0.5 to 2.5 s with a manifest, and config.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, base in (("whisper", WHISPER), ("llm", QWEN3)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(base))
    for file in LLM_FILES:
        shutil.copy(TOKENIZER / file, folder / "llm")
    model = experiment.build(get_config(str(folder)), weights=False).model
    rng = np.random.default_rng(0)
    leaves = experiment.abstract_params(model, "float32")
    leaves = {path: leaf for path, leaf in leaves.items() if experiment.is_base(path)}
    draws = {
        path: (path.endswith("/scale") + 0.15 * rng.normal(size=leaf.shape)).astype(np.float32)
        for path, leaf in leaves.items()
    }
    tree = unflatten_dict(draws, sep="/")
    save_file(
        dict(engine.store(tree["encoder"], layouts.hf_whisper())),
        folder / "whisper/model.safetensors",
    )
    save_file(
        dict(engine.store(tree["llm"], layouts.hf_decoder())), folder / "llm/model.safetensors"
    )

    lines = []
    for number in range(24):
        samples = rng.normal(0, 0.1, 8000 + 1300 * number).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", samples, 16_000)
        text = " ".join(WORDS[: 1 + number % 8])
        lines.append(
            {
                "audio_filepath": f"{number}.wav",
                "duration": len(samples) / 16_000,
                "text": text,
                "task": "asr",
            }
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    here = pathlib.Path(__file__).parent
    (folder / "config.py").write_text(
        f"import sys\n\nsys.path.insert(0, {str(here)!r})\nimport tiny_experiment\n\n\n"
        f"def get_config():\n    return tiny_experiment.get_config({str(folder)!r})\n"
    )


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """{step: loss} from metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def cache_programs(folder: pathlib.Path) -> None:
    """Turns on the compilation cache, so that the runs of one process compile once."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
