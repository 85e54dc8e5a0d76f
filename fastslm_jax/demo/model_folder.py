"""Folders of the demo's pretrained models: Hugging Face format plus TRAINING.json."""

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

CHECKPOINTS = "training"  # subfolder of an unfinished model


def create_unfinished(out: pathlib.Path, name: str) -> pathlib.Path:
    """OUT/NAME.unfinished, where a model is trained until `publish` renames it."""
    folder = out / f"{name}.unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def command_line(module: str, flag_names: Sequence[str]) -> str:
    """The command that reproduces this run, with the values of its flags."""
    values = {name: flags.FLAGS[name].value for name in flag_names}
    arguments = [f"--{name}={value}" for name, value in values.items() if value != ""]
    return " ".join([f"python -m fastslm_jax.demo.{module}", *arguments])


def earlier_training(folder: str) -> dict[str, object]:
    """TRAINING.json of the model that training starts from, as an entry of the new one."""
    return {
        "initialized_from": json.loads(
            (pathlib.Path(folder) / "TRAINING.json").read_text(encoding="utf-8")
        )
    }


def write(
    folder: pathlib.Path,
    config: Mapping[str, object],
    tensors: Iterable[tuple[str, np.ndarray]],
    training: Mapping[str, object],
) -> None:
    """Writes config.json, model.safetensors (bfloat16), and TRAINING.json.

    Args:
        folder: where to write.
        config: the Hugging Face config.
        tensors: (name, value) of every tensor.
        training: command, seed, time and metrics.
    """
    stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors}
    save_file(stored, folder / "model.safetensors")
    _write_json(folder / "config.json", {**config, "torch_dtype": "bfloat16"})
    _write_json(folder / "TRAINING.json", training)


def _write_json(path: pathlib.Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def publish(unfinished: pathlib.Path) -> pathlib.Path:
    """Removes the checkpoints and renames NAME.unfinished to NAME, replacing an older one."""
    shutil.rmtree(unfinished / CHECKPOINTS)
    folder = unfinished.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    return unfinished.rename(folder)
