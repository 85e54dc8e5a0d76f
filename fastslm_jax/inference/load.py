"""Loads a Generator from a working directory; shared by eval, transcribe and the benchmarks."""

import os
import pathlib

from absl import logging
from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax import sharding
from fastslm_jax.errors import UserError
from fastslm_jax.inference.generator import Generator
from fastslm_jax.training import experiment, optim
from fastslm_jax.training.checkpoint import CheckpointError, Checkpoints
from fastslm_jax.weights import pretrained


def find_step(
    checkpoints: Checkpoints, workdir: str | os.PathLike[str], step: int | str | None = None
) -> int:
    """The requested step, or the newest.

    Args:
        step: a step, or "best" for the one with the best dev scores.

    Raises:
        CheckpointError: there are no checkpoints, none of that step, or none with dev scores.
    """
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{workdir}: contains no finished checkpoint")
    if step is None:
        return steps[-1]
    available = ", ".join(map(str, steps))
    if step == "best":
        best = checkpoints.best_step()
        if best is None:
            raise CheckpointError(
                f"{workdir}: no checkpoint has dev scores, so none is the best: train with "
                f"config.data.dev, or choose one of the steps {available}"
            )
        return best
    if str(step) not in map(str, steps):
        raise CheckpointError(f"{workdir}: has checkpoints of steps {available}, not {step}")
    return int(step)


def saved_config(
    checkpoints: Checkpoints,
    workdir: str | os.PathLike[str],
    step: int,
    whisper: str | None = None,
    llm: str | None = None,
) -> ConfigDict:
    """The config in a checkpoint, checked.

    Args:
        whisper, llm: pretrained folders or hub ids that replace the config's. By default a folder
            that no longer exists is replaced by WORKDIR/bases, which an import writes, so that
            working directories can be moved.
    """
    saved, where = checkpoints.meta(step).get("config"), f"{checkpoints.folder}/{step}: config"
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where} is missing; use another checkpoint")
    config = config_lib.from_saved(saved, where)
    for name, given in (("whisper", whisper), ("llm", llm)):
        local = pathlib.Path(workdir) / "bases" / name
        if given:
            config.base[name] = given
        elif not os.path.isdir(config.base[name]) and local.is_dir():
            config.base[name] = str(local)
    return config


def load(
    config: ConfigDict,
    checkpoints: Checkpoints,
    step: int,
    other_bases: bool = False,
    **options: object,
) -> Generator:
    """The model of a checkpoint on all devices; see `Generator` for the options.

    Uses config.mesh if it fits the devices, otherwise puts them all on the data axis.

    Args:
        other_bases: see `experiment.restore_params`.
    """
    config_lib.check(config)
    try:
        mesh = sharding.make_mesh(**config.mesh)
    except UserError:
        mesh = sharding.make_mesh()
        logging.info("config.mesh does not fit the %d devices: using the data axis", mesh.size)
    setup = experiment.build(config, mesh=mesh)
    params = experiment.restore_params(setup, checkpoints, step, mesh, other_bases)
    native = pretrained.read_config(setup.llm_folder).get("max_position_embeddings")
    return Generator(
        setup.model,
        optim.merge(params, {}),
        setup.prompt_tokenizer(),
        native_positions=native,
        **options,
    )
