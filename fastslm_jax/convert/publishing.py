"""A small working directory to share: the trained parameters of one checkpoint, in bfloat16.

OUT/checkpoints/STEP/params   trained parameters in bfloat16, other parameters as they are
                     meta     config with the names of the pretrained models, their fingerprints
OUT/config.json               the config in the checkpoint

The config has no folders of this machine, if the pretrained models have hub ids: absolute paths of
data keep their last two parts, and init_from is empty.

Loading it needs the pretrained models, by hub id or folder, and checks their fingerprints.
"""

import os
import pathlib

import jax.numpy as jnp
from ml_collections import ConfigDict

from fastslm_jax.convert import opening
from fastslm_jax.training import optim
from fastslm_jax.training.checkpoint import write_workdir
from fastslm_jax.weights.tensors import atomic_folder


def publish(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | str | None = None,
    whisper: str | None = None,
    llm: str | None = None,
    dtype: str | None = None,
) -> tuple[int, int]:
    """Writes the working directory `out`: one checkpoint without optimizer state.

    Args:
        workdir: working directory of the run.
        step: the checkpoint: a step, "best", or None for the newest.
        whisper, llm: hub ids for the config in place of its own, such as folders of this machine.
        dtype: of activations and pretrained weights, for the config in place of its own: CPUs are
            many times slower in bfloat16 than in float32.

    Returns:
        The step, and the number of trained arrays.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    given = opening.open_workdir(workdir, step)
    stored = sorted(given.meta["checksums"]["params"])
    is_trained = optim.trainable_mask(sorted(given.leaves), given.config.trainable)
    params = {
        path: jnp.asarray(given.leaves[path], jnp.bfloat16 if is_trained[path] else None)
        for path in stored
    }
    config = given.config
    for name, hub_id in (("whisper", whisper), ("llm", llm)):
        config.base[name] = hub_id or config.base[name]
    if dtype:
        config.model.dtype = config.model.base_dtype = dtype
    leave_out_folders(config)
    meta = {name: given.meta[name] for name in ("row", "bases")} | {"config": config.to_dict()}
    with atomic_folder(out) as folder:
        write_workdir(folder, given.step, params, meta)
        for file in folder.rglob("commit_success.txt"):  # Orbax reads that it exists
            file.write_text("Checkpoint commit was successful\n", encoding="utf-8")
    return given.step, sum(is_trained[path] for path in stored)


def leave_out_folders(config: ConfigDict) -> None:
    """Shortens the paths of data, and removes the run that was the start."""
    for source in config.data.train.values():
        source.path = _short(source.path)
    for name, path in config.eval.sets.items():
        config.eval.sets[name] = _short(path)
    config.data.dev = _short(config.data.dev)
    for name in {"init_from", "init_from_step"} & set(config):
        config[name] = ""


def _short(path: str) -> str:
    """Example: "/home/me/speech/train.jsonl" → "speech/train.jsonl"."""
    parts = pathlib.PurePath(path).parts
    return str(pathlib.PurePath(*parts[1:][-2:])) if pathlib.PurePath(path).is_absolute() else path
