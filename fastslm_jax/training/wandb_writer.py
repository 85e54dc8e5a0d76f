"""Metrics for Weights & Biases: the extra [wandb], config.wandb."""

import importlib.util
import pathlib
import secrets
import sys
from collections.abc import Mapping

from fastslm_jax import outputs
from fastslm_jax.errors import UserError


class WandbWriter:
    """Sends metrics to Weights & Biases, or with WANDB_MODE=offline to WORKDIR/wandb.

    A resumed run has the same id, from WORKDIR/wandb_id. W&B ignores the steps that it repeats.
    Implements the methods of `clu.metric_writers.MetricWriter` that training uses.

    Args:
        project: config.wandb.
        config: of the run, shown by W&B.

    Raises:
        UserError: the package is missing, or W&B refuses the run.
    """

    def __init__(self, project: str, workdir: pathlib.Path, config: Mapping) -> None:
        check_wandb(project)
        import wandb  # an extra

        id_file = workdir / "wandb_id"
        if not id_file.exists():
            outputs.write_text(id_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=workdir.name,
                dir=workdir,
                config=dict(config),
                settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.Error as error:  # not logged in, or no network
            raise UserError(
                f"config.wandb={project}: {error}; run `wandb login`, or set WANDB_MODE=offline "
                "and send the metrics later with `wandb sync`"
            ) from None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._run.log(dict(texts), step=step)

    def flush(self) -> None:
        """Does nothing: a process of W&B sends the metrics."""

    def close(self) -> None:
        """Ends the run; while an exception ends the training, as failed."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def check_wandb(project: str) -> None:
    """Raises UserError if config.wandb names a project and the package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"config.wandb={project}: needs the package wandb; pip install -e .[wandb]")
