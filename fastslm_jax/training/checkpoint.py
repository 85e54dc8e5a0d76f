"""Orbax checkpoints of a working directory.

    WORKDIR/checkpoints/STEP/params   what training changes or made: everything but the frozen bases, flat {path: array}
                             train    optimiser state and counters
                             meta     config, row number, fingerprints of bases and data, checksums of all the above

The frozen bases are not saved again: they are named in the config, and a fingerprint says that they are the same.
"""

import contextlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from fastslm_jax.errors import UserError
from fastslm_jax.training.checksums import changed, checksums

FORMAT = 1
DISK_ERRORS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "Read-only",
    "Permission denied",
)


class CheckpointError(UserError):
    """A working directory whose checkpoints cannot be used: says which and why."""


class TornCheckpointError(CheckpointError):
    """A checkpoint that was damaged, or not written to its end."""


class Checkpoints:
    """The checkpoints of a working directory: saved asynchronously, the last `keep` and the best one are kept."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, read_only: bool = False):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"{workdir}: holds no checkpoints; train there first, or name another --workdir"
            )
        policies = [preservation_policy.LatestN(n=keep)]
        policies.append(
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: -metrics["wer"],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # what a kill in the middle of a save left behind
        )
        self._failed = False
        with contextlib.nullcontext() if read_only else self._writing():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        params: Mapping,
        train: Mapping,
        meta: Mapping,
        metrics: Mapping | None = None,
    ) -> None:
        """Starts to save; a checkpoint appears whole or not at all. Saving a step twice is no error.

        Raises:
            CheckpointError: this checkpoint, or the one before that was still being written, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        items = {"params": ocp.args.StandardSave(dict(params))}
        meta = {"format": FORMAT, **meta, "checksums": {"params": checksums(dict(params))}}
        if train:  # an imported checkpoint has none
            items["train"] = ocp.args.StandardSave(dict(train))
            meta["checksums"]["train"] = checksums(dict(train))
        items["meta"] = ocp.args.JsonSave(meta | {"crc32": _crc32(meta)})
        if "wer" not in (metrics or {}):  # without a word error rate there is no best one
            metrics = None
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def wait(self) -> None:
        """Until all is written. Raises CheckpointError as `save`."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self):
        """A full disk, or whatever else hinders writing, in one line; the checkpoints before it stay."""
        try:
            yield
        except Exception as error:  # storage layers raise many kinds
            self._failed = True
            lines = (str(error) or type(error).__name__).splitlines()
            reason = next((words for words in DISK_ERRORS if words in str(error)), lines[0][:300])
            kept = [
                int(folder.name) for folder in self.folder.glob("[0-9]*") if folder.name.isdigit()
            ]
            left = (
                f"step {max(kept)} is the last one that can be used"
                if kept
                else "there is none before it"
            )
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({reason}); {left}. Make room there and run the same "
                "command again"
            ) from None

    def close(self) -> None:
        if not self._failed:  # else there is nothing that it could finish
            self._manager.close()

    def meta(self, step: int) -> dict:
        try:
            meta = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
            expected = meta.pop("crc32", None)
        except (OSError, ValueError, AttributeError) as error:
            raise TornCheckpointError(
                f"{self.folder / str(step)}: its meta is not readable ({error})"
            ) from None
        if expected not in (None, _crc32(meta)):
            raise TornCheckpointError(
                f"{self.folder / str(step)}: its meta is not what was written"
            )
        return meta

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
        items = ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        )
        restored = self._manager.restore(step, args=items)
        saved = self.meta(step).get("checksums", {})
        for name in abstract:
            if wrong := changed(restored[name], saved.get(name, {})):
                raise TornCheckpointError(
                    f"{self.folder / str(step)}: {name} {wrong[0]} is not what was saved ({len(wrong)} such): the file is damaged"
                )
        return restored

    def _check_shapes(self, step: int, abstract: Mapping) -> None:
        saved = (
            ocp.StandardCheckpointer().metadata(self.folder / str(step) / "params").item_metadata
        )
        saved = {name: tuple(leaf.shape) for name, leaf in dict(saved).items()}
        where = self.folder / str(step)
        for path in sorted(set(saved) ^ set(abstract)):
            side = "has no place in this config's model" if path in saved else "is missing"
            raise CheckpointError(
                f"{where}: parameter {path} {side}; is it a checkpoint of this config?"
            )
        for path, leaf in abstract.items():
            if tuple(leaf.shape) != saved[path]:
                raise CheckpointError(
                    f"{where}: parameter {path} is {saved[path]}, this config's is {tuple(leaf.shape)}"
                )

    def restore_latest(
        self, params: Mapping, train: Mapping
    ) -> tuple[int, dict, dict, dict] | None:
        """(step, params, train, meta) of the newest checkpoint that is whole; None without any.

        Torn ones are skipped aloud and set aside as STEP.torn, so that their steps can be saved again.

        Raises:
            CheckpointError: there are checkpoints, but none can be read.
        """
        errors = {}
        for step in reversed(self.steps()):
            restored, error = None, None
            try:
                restored = step, *self.restore(step, params, train), self.meta(step)
            except Exception as raised:  # whatever a damaged file makes the storage layers raise
                if isinstance(raised, CheckpointError) and not isinstance(
                    raised, TornCheckpointError
                ):
                    raise
                error = (str(raised) or type(raised).__name__).splitlines()[0]
            if _on_every_process(restored is not None):
                self._set_aside(list(errors))
                return restored
            errors[step] = error or "another process cannot read it"
            logging.error(
                "checkpoint %s cannot be read, trying the one before: %s",
                self.folder / str(step),
                errors[step],
            )
        if errors:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in errors.items())
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be read ({reasons[:400]}); remove the folder to start anew"
            )
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


def _crc32(meta: Mapping) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _on_every_process(is_true: bool) -> bool:
    if jax.process_count() == 1:
        return is_true
    return bool(np.all(multihost_utils.process_allgather(np.array(is_true))))
