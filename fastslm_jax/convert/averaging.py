"""Averages the last checkpoints of a run: one model, usually better than each of them.

WORKDIR/checkpoints/0   the averaged parameters, without optimizer state; its meta names the steps
WORKDIR/config.json     the config in the checkpoint
"""

import os
import pathlib

import jax
import numpy as np

from fastslm_jax import sharding
from fastslm_jax.errors import UserError
from fastslm_jax.inference import load
from fastslm_jax.training import experiment, optim
from fastslm_jax.training.checkpoint import Checkpoints, write_workdir
from fastslm_jax.weights.tensors import atomic_folder


def average(workdir: str | os.PathLike, out: str | os.PathLike, last: int) -> tuple[list[int], int]:
    """Writes the working directory `out`: the mean of the trained parameters, in float32.

    Args:
        workdir: working directory of the run.
        last: how many of its newest checkpoints to average.

    Returns:
        The averaged steps, and the number of averaged parameters.

    Raises:
        UserError: there are too few checkpoints, they are damaged, or they differ in more than
            their trained parameters.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    newest = load.find_step(checkpoints, workdir)
    steps = checkpoints.steps()[-last:]
    if len(steps) < last:
        s = "s" * (len(steps) > 1)
        raise UserError(
            f"--last={last}: {workdir} has {len(steps)} checkpoint{s} "
            f"(step{s} {', '.join(map(str, steps))}); average fewer, or train with "
            f"--config.keep_checkpoints={last}"
        )
    config = load.saved_config(checkpoints, workdir, newest)
    setup = experiment.build(config)
    checkpoints.check_bases(newest, setup.fingerprints())
    metas = {step: checkpoints.meta(step) for step in steps}
    for step in steps:
        for field in ("model", "trainable"):
            if metas[step]["config"].get(field) != metas[newest]["config"][field]:
                raise UserError(
                    f"{workdir}: config.{field} of step {step} differs from that of step {newest}; "
                    "average fewer checkpoints"
                )
        if metas[step]["bases"] != metas[newest]["bases"]:
            raise UserError(
                f"{workdir}: steps {step} and {newest} were trained on different pretrained "
                "weights; average fewer checkpoints"
            )
    with atomic_folder(out) as folder:
        mean, num_trained = _mean(checkpoints, steps, setup)
        meta = {
            "config": config.to_dict(),
            "row": 0,
            "bases": metas[newest]["bases"],
            "averaged": {"from": str(pathlib.Path(workdir).absolute()), "steps": steps},
        }
        write_workdir(folder, 0, mean, meta)
    return steps, num_trained


def _mean(
    checkpoints: Checkpoints, steps: list[int], setup: experiment.Experiment
) -> tuple[dict[str, np.ndarray], int]:
    """{path: array} of everything that a checkpoint stores, and the number of averaged arrays."""
    mesh = sharding.make_mesh(data=1, devices=jax.local_devices()[:1])
    shapes = experiment.abstract_params(setup.model, setup.base_dtype, mesh)
    is_trained = optim.trainable_mask(sorted(shapes), setup.trainable)
    saved = {path: shapes[path] for path in experiment.saved_paths(shapes, setup.trainable)}
    sums: dict[str, np.ndarray] = {}
    for step in steps:
        for path, leaf in checkpoints.restore_params(step, saved).items():
            if is_trained[path]:
                sums[path] = sums.get(path, np.float32(0)) + np.asarray(leaf, np.float32)
            elif not np.array_equal(sums.setdefault(path, np.asarray(leaf)), leaf):
                raise UserError(
                    f"{checkpoints.folder}: the frozen parameter {path} of step {step} differs "
                    f"from that of step {steps[0]}; average fewer checkpoints"
                )
    trained = [path for path in saved if is_trained[path]]
    means = {path: (sums[path] / len(steps)).astype(saved[path].dtype) for path in trained}
    return sums | means, len(trained)
