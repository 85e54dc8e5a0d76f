"""Orbax checkpoints of a working directory.

    WORKDIR/checkpoints/STEP/params   what training changes or made: everything but the frozen bases, flat {path: array}
                             train    optimiser state and counters
                             meta     config, row number, the bases' fingerprints

The frozen bases are not saved again: they are named in the config, and a fingerprint says that they are the same.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from fastslm_jax.errors import UserError

FORMAT = 1


class CheckpointError(UserError):
    """A working directory whose checkpoints cannot be used: says which and why."""


class TornCheckpointError(CheckpointError):
    """A checkpoint that was damaged, or not written to its end."""


class Checkpoints:
    """The checkpoints of a working directory: saved asynchronously, the last `keep` and the best one are kept."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, read_only: bool = False):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{workdir}: holds no checkpoints; train there first, or name another --workdir")
        policies = [preservation_policy.LatestN(n=keep)]
        policies.append(
            preservation_policy.BestN(get_metric_fn=lambda metrics: -metrics["wer"], n=1, keep_checkpoints_without_metrics=False)
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=not read_only, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Mapping, train: Mapping, meta: Mapping, metrics: Mapping | None = None) -> None:
        """Starts to save; a checkpoint appears whole or not at all. Saving a step twice is no error."""
        if step in self._manager.all_steps():
            return
        items = {"params": ocp.args.StandardSave(dict(params)), "meta": ocp.args.JsonSave({"format": FORMAT, **meta})}
        if train:  # an imported checkpoint has none
            items["train"] = ocp.args.StandardSave(dict(train))
        if "wer" not in (metrics or {}):  # without a word error rate there is no best one
            metrics = None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def meta(self, step: int) -> dict:
        try:
            return json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
        except (OSError, ValueError) as error:
            raise TornCheckpointError(f"{self.folder / str(step)}: its meta is not readable ({error})") from None

    def check_bases(self, step: int, fingerprints: Mapping[str, str]) -> None:
        """The bases of a config must be those that the checkpoint was trained on."""
        for name, fingerprint in self.meta(step)["bases"].items():
            if fingerprint != fingerprints[name]:
                raise CheckpointError(
                    f"{self.folder / str(step)}: was trained on another {name} base ({fingerprint}; config.base.{name} is now "
                    f"{fingerprints[name]}); name the same base, or a new --workdir"
                )

    def restore_params(self, step: int, abstract: Mapping) -> dict[str, jax.Array]:
        """Parameters {path: array} in the shapes and shardings of `abstract`."""
        return self._restore(step, {"params": dict(abstract)})["params"]

    def restore(self, step: int, params: Mapping, train: Mapping) -> tuple[dict, dict]:
        """Parameters and training state in the shapes and shardings given; an imported checkpoint has no state: {}."""
        items = {"params": dict(params)}
        if (self.folder / str(step) / "train").is_dir() or "imported" not in self.meta(step):
            items["train"] = dict(train)
        restored = self._restore(step, items)
        return restored["params"], restored.get("train", {})

    def _restore(self, step: int, abstract: Mapping) -> dict:
        self._check_shapes(step, abstract["params"])
        items = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
        return self._manager.restore(step, args=items)

    def _check_shapes(self, step: int, abstract: Mapping) -> None:
        saved = ocp.StandardCheckpointer().metadata(self.folder / str(step) / "params").item_metadata
        saved = {name: tuple(leaf.shape) for name, leaf in dict(saved).items()}
        where = self.folder / str(step)
        for path in sorted(set(saved) ^ set(abstract)):
            side = "has no place in this config's model" if path in saved else "is missing"
            raise CheckpointError(f"{where}: parameter {path} {side}; is it a checkpoint of this config?")
        for path, leaf in abstract.items():
            if tuple(leaf.shape) != saved[path]:
                raise CheckpointError(f"{where}: parameter {path} is {saved[path]}, this config's is {tuple(leaf.shape)}")

    def restore_latest(self, params: Mapping, train: Mapping) -> tuple[int, dict, dict, dict] | None:
        """(step, params, train, meta) of the newest checkpoint that is whole; None without any.

        Torn ones are skipped aloud and set aside as STEP.torn, so that their steps can be saved again.

        Raises:
            CheckpointError: there are checkpoints, but none can be read.
        """
        errors = {}
        for step in reversed(self.steps()):
            try:
                restored = step, *self.restore(step, params, train), self.meta(step)
            except Exception as error:  # whatever a torn file makes the storage layers raise
                if isinstance(error, CheckpointError) and not isinstance(error, TornCheckpointError):
                    raise
                logging.error("checkpoint %s cannot be read, trying the one before: %s", self.folder / str(step), error)
                errors[step] = (str(error) or type(error).__name__).splitlines()[0]
            else:
                self._set_aside(list(errors))
                return restored
        if errors:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in errors.items())
            raise CheckpointError(f"{self.folder}: no checkpoint can be read ({reasons[:400]}); remove the folder to start anew")
        return None

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                shutil.rmtree(self.folder / f"{step}.torn", ignore_errors=True)
                (self.folder / str(step)).rename(self.folder / f"{step}.torn")
        multihost_utils.sync_global_devices("torn checkpoints set aside")
        self._manager.reload()
