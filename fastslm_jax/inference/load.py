"""A working directory → a `Generator`: what eval, transcribe and the benchmarks share."""

import os
import pathlib

from absl import logging
from ml_collections import ConfigDict

from fastslm_jax import sharding
from fastslm_jax.errors import UserError
from fastslm_jax.inference.generator import Generator
from fastslm_jax.training import experiment, optim
from fastslm_jax.training.checkpoint import CheckpointError, Checkpoints
from fastslm_jax.weights import pretrained


def find_step(checkpoints: Checkpoints, workdir: str | os.PathLike, step: int | None = None) -> int:
    """The step asked for, or the newest.

    Raises:
        CheckpointError: there is none, or not that one.
    """
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{workdir}: holds no finished checkpoint")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{workdir}: has checkpoints of steps {', '.join(map(str, steps))}, not {step}"
        )
    return steps[-1] if step is None else step


def saved_config(
    checkpoints: Checkpoints,
    workdir: str | os.PathLike,
    step: int,
    whisper: str | None = None,
    llm: str | None = None,
) -> ConfigDict:
    """The config in a checkpoint, its bases replaced by those given.

    A base's folder that is gone is looked for in WORKDIR/bases, where an import puts it: a working directory may be moved.
    """
    config = ConfigDict(checkpoints.meta(step)["config"])
    for name, given in (("whisper", whisper), ("llm", llm)):
        beside = pathlib.Path(workdir) / "bases" / name
        if given:
            config.base[name] = given
        elif not os.path.isdir(config.base[name]) and beside.is_dir():
            config.base[name] = str(beside)
    return config


def load(config: ConfigDict, checkpoints: Checkpoints, step: int, **options) -> Generator:
    """The model of a checkpoint on all devices: on config.mesh or, if that is for others, along data. See `Generator`."""
    try:
        mesh = sharding.make_mesh(**config.mesh)
    except UserError:
        mesh = sharding.make_mesh()
        logging.info("config.mesh is for other devices: the %d at hand lie along data", mesh.size)
    setup = experiment.build(config, mesh=mesh)
    params = optim.merge(experiment.restore_params(setup, checkpoints, step, mesh), {})
    native = pretrained.read_config(setup.llm_folder).get("max_position_embeddings")
    return Generator(
        setup.model, params, setup.prompt_tokenizer(), native_positions=native, **options
    )
