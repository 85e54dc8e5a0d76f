"""Imports a released state_dict or an exported PyTorch folder as a working directory.

WORKDIR/bases/whisper, WORKDIR/bases/llm   frozen pretrained models, as Hugging Face folders
WORKDIR/checkpoints/0                      all other parameters, without optimizer state
WORKDIR/config.json                        the config in the checkpoint
"""

import os
import pathlib
import shutil

import numpy as np

from fastslm_jax.convert import opening, stored
from fastslm_jax.convert.released import open_released
from fastslm_jax.convert.stored import Stored
from fastslm_jax.errors import UserError
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import write_workdir
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import atomic_folder, write_sharded

ARCHITECTURES = {  # by model_type
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def import_checkpoint(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    llm: str | None = None,
    lora_alpha: float | None = None,
) -> Stored:
    """Writes the working directory `out`.

    Args:
        path: a released state_dict or a folder written by `export --layout=hf`.
        llm, lora_alpha: see `open_released`.

    Returns:
        The opened `path`.
    """
    kind = opening.kind_of(path)
    if kind == "workdir":
        raise UserError(f"{path}: is already a working directory; no import is needed")
    if kind == "hf":
        given = opening.open_hf(path)
    else:
        given = open_released(path, llm=llm, lora_alpha=lora_alpha)
    given.load_tokenizer()  # raises now if it is unusable
    out = pathlib.Path(out)
    with atomic_folder(out) as folder:
        _write_whisper(folder / "bases/whisper", given)
        _write_llm(folder / "bases/llm", given)
        config = given.config
        config.base.whisper = str(out.absolute() / "bases/whisper")
        config.base.llm = str(out.absolute() / "bases/llm")
        _write_checkpoint(folder, given)
    return given


def _write_checkpoint(folder: pathlib.Path, given: Stored) -> None:
    """Writes step 0 and config.json. `imported` records the dtypes for a bit-exact export."""
    ours = {path: leaf for path, leaf in given.leaves.items() if not experiment.is_base(path)}
    meta = {
        "config": given.config.to_dict(),
        "row": 0,
        "bases": {
            name: pretrained.fingerprint(folder / "bases" / name) for name in ("whisper", "llm")
        },
        "imported": {
            "from": str(given.path),
            "dtypes": {path: leaf.dtype.name for path, leaf in ours.items()},
        },
    }
    params = {path: leaf.read().astype(np.float32) for path, leaf in ours.items()}
    write_workdir(folder, 0, params, meta)


def _pretrained_leaves(given: Stored, prefix: str) -> dict[str, engine.StoredLeaf]:
    """The leaves of one pretrained model, without the prefix in their paths."""
    return {
        path.removeprefix(prefix): leaf
        for path, leaf in given.leaves.items()
        if path.startswith(prefix) and experiment.is_base(path)
    }


def _write_whisper(folder: pathlib.Path, given: Stored) -> None:
    folder.mkdir(parents=True)
    leaves = _pretrained_leaves(given, "encoder/")
    config = {"architectures": ["WhisperForConditionalGeneration"], **given.whisper_config}
    config["dtype"] = stored.common_dtype(leaves.values())
    stored.write_json(folder / "config.json", config)
    write_sharded(folder, engine.tensors(leaves, layouts.hf_whisper()))


def _write_llm(folder: pathlib.Path, given: Stored) -> None:
    folder.mkdir(parents=True)
    leaves = _pretrained_leaves(given, "llm/")
    config = {
        name: value
        for name, value in given.llm_config.items()
        if name not in ("torch_dtype", "_name_or_path")
    }
    config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    config["dtype"] = stored.common_dtype(leaves.values())
    stored.write_json(folder / "config.json", config)
    write_sharded(folder, engine.tensors(leaves, layouts.hf_decoder()))
    for name in TOKENIZER_FILES:
        if (given.tokenizer / name).is_file():
            shutil.copyfile(given.tokenizer / name, folder / name)
