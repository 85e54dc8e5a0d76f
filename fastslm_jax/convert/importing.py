"""A FastSLM of PyTorch → a working directory.

WORKDIR/bases/whisper, WORKDIR/bases/llm   the frozen bases, which are a part of the file, as Hugging Face folders
WORKDIR/checkpoints/0                      the rest, as a checkpoint of step 0 without optimiser state
WORKDIR/config.json                        the config saved in the checkpoint
"""

import os
import pathlib
import shutil
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from fastslm_jax.convert import stored
from fastslm_jax.data import prompts
from fastslm_jax.errors import UserError
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import finished_folder, write_sharded

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


def import_checkpoint(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    llm: str | None = None,
    lora_alpha: float | None = None,
) -> stored.Stored:
    """Writes the working directory and returns what was read."""
    kind = stored.kind_of(path)
    if kind == "workdir":
        raise UserError(f"{path}: is a working directory already")
    given = (
        stored.open_hf(path)
        if kind == "hf"
        else stored.open_released(path, llm=llm, lora_alpha=lora_alpha)
    )
    prompts.load_tokenizer(
        given.tokenizer, given.model.llm.vocab_size
    )  # fails now if it cannot be used
    out = pathlib.Path(out)
    with finished_folder(out) as folder:
        write_whisper(folder / "bases/whisper", given)
        write_llm(folder / "bases/llm", given)
        config = given.config
        config.base.whisper, config.base.llm = (
            str(out.absolute() / "bases/whisper"),
            str(out.absolute() / "bases/llm"),
        )
        ours = {path: leaf for path, leaf in given.leaves.items() if not experiment.is_base(path)}
        checkpoints = Checkpoints(folder)
        meta = {
            "config": config.to_dict(),
            "row": 0,
            "bases": {
                name: pretrained.fingerprint(folder / "bases" / name) for name in ("whisper", "llm")
            },
            "imported": {
                "from": str(path),
                "dtypes": {path: leaf.dtype.name for path, leaf in ours.items()},
            },
        }
        checkpoints.save(
            0, {path: leaf.read().astype(np.float32) for path, leaf in ours.items()}, {}, meta
        )
        checkpoints.wait()
        checkpoints.close()
        (folder / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
    return given


def _of(leaves: Mapping, prefix: str) -> dict:
    return {
        path.removeprefix(prefix): leaf
        for path, leaf in leaves.items()
        if path.startswith(prefix) and experiment.is_base(path)
    }


def whisper_config(given: stored.Stored) -> dict:
    """config.json of the encoder."""
    encoder = given.model.encoder
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "d_model": encoder.width,
        "encoder_layers": encoder.num_layers,
        "encoder_attention_heads": encoder.num_heads,
        "encoder_ffn_dim": encoder.mlp_dim,
        "num_mel_bins": encoder.num_mels,
        "max_source_positions": encoder.max_positions,
        "activation_function": "gelu",
    }


def write_whisper(folder: pathlib.Path, given: stored.Stored) -> None:
    folder.mkdir(parents=True)
    leaves = _of(given.leaves, "encoder/")
    stored.save_json(
        folder / "config.json",
        whisper_config(given) | {"dtype": stored.common_dtype(leaves.values())},
    )
    write_sharded(folder, engine.tensors(leaves, layouts.hf_whisper()))


def write_llm(folder: pathlib.Path, given: stored.Stored) -> None:
    folder.mkdir(parents=True)
    leaves = _of(given.leaves, "llm/")
    dtype = stored.common_dtype(leaves.values())
    config = {
        name: value
        for name, value in given.llm_config.items()
        if name not in ("torch_dtype", "_name_or_path")
    }
    stored.save_json(
        folder / "config.json", config | {"architectures": ["Qwen3ForCausalLM"], "dtype": dtype}
    )
    write_sharded(folder, engine.tensors(leaves, layouts.hf_qwen3()))
    for name in TOKENIZER_FILES:
        if (given.tokenizer / name).is_file():
            shutil.copyfile(given.tokenizer / name, folder / name)


def original_dtype(given: stored.Stored, path: str) -> np.dtype | None:
    """The type that a parameter of an imported checkpoint had where it came from."""
    name = given.meta.get("imported", {}).get("dtypes", {}).get(path)
    return None if name is None else np.dtype(getattr(ml_dtypes, name, name))
