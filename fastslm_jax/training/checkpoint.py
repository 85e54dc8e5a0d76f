"""Orbax checkpoints of a working directory.

    WORKDIR/checkpoints/STEP/params   {path: array}; frozen pretrained weights are left out
                             train    optimizer state and counters
                             meta     config, row number, fingerprints, checksums

The config names the frozen pretrained weights, and a fingerprint verifies that they are the same.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from fastslm_jax import outputs
from fastslm_jax.errors import UserError
from fastslm_jax.training import best, checkpoint_meta
from fastslm_jax.training.checkpoint_meta import CheckpointError, TornCheckpointError
from fastslm_jax.training.checksums import changed, checksums, leaf_paths
from fastslm_jax.training.config_changes import differences

DISK_ERRORS = {  # of a sound checkpoint, and what to do
    "No space left": "free some space",
    "File too large": "raise the limit (ulimit -f)",
    "quota exceeded": "free some space",
    "Read-only": "make it writable",
    "Permission denied": "make it writable",
    "timed out": "check that this storage answers in time",
}


def lock(workdir: str | os.PathLike, work: str = "training") -> TextIO:
    """Locks a working directory until this process ends or the returned file is closed.

    Raises:
        UserError: the folder cannot be written, or another process holds the lock.
    """
    path = outputs.check_folder(workdir, "--workdir") / ".lock"
    file = open(path, "wb")  # noqa: SIM115 (the lock lasts as long as the file is open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"{workdir}: another process is {work} there; wait for it, or use another --workdir"
        ) from None
    return file


def write_workdir(folder: pathlib.Path, step: int, params: Mapping, meta: Mapping) -> None:
    """Fills a folder as a working directory of one checkpoint, without training state.

    Args:
        meta: of the checkpoint; its config also goes to config.json.
    """
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, params, {}, meta)
    checkpoints.close()
    outputs.write_text(folder / "config.json", json.dumps(meta["config"], indent=1) + "\n")


class Checkpoints:
    """The checkpoints of a working directory. Saves are asynchronous.

    Keeps the last `keep` checkpoints and the best one by its dev scores (see `best`).
    """

    def __init__(
        self, workdir: str | os.PathLike, *, keep: int = 2, read_only: bool = False
    ) -> None:
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"{workdir}: no checkpoints; train there first, or use another --workdir"
            )
        self._scores: dict[int, best.Scores] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.LatestN(n=keep), best.KeepBest(self._scores_of)]
            ),
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were interrupted by a kill
        )
        self._failed = False
        with contextlib.nullcontext() if read_only else self._writing():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best dev scores; None if none has any."""
        return best.best_step({step: self._scores_of(step) for step in self.steps()})

    def _scores_of(self, step: int) -> best.Scores:
        """Dev scores of a step; {} if it has none or is damaged."""
        if step not in self._scores:
            try:
                self._scores[step] = self._meta(step).get("scores", {})
            except CheckpointError:
                return {}
        return self._scores[step]

    # ---------------------------------------------------------------------------------------- save

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        train: Mapping,
        meta: Mapping,
        scores: best.Scores | None = None,
    ) -> None:
        """Starts an atomic save. Does nothing if the step is already saved.

        Args:
            train: optimizer state and counters; {} for a checkpoint without.
            scores: of the dev set.

        Raises:
            CheckpointError: this save, or the one still running, failed.
        """
        if step in self._manager.all_steps():
            return
        items = {"params": ocp.args.StandardSave(dict(params))}
        meta = {**meta, "checksums": {"params": checksums(dict(params))}}
        if train:
            items["train"] = ocp.args.StandardSave(dict(train))
            meta["checksums"]["train"] = checksums(dict(train))
        self._scores[step] = best.finite(scores or {})
        if self._scores[step]:
            meta["scores"] = self._scores[step]
        items["meta"] = ocp.args.JsonSave(checkpoint_meta.sealed(meta))
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Waits until all saves are finished. Raises CheckpointError like `save`."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns any failed write, such as a full disk, into a CheckpointError."""
        try:
            yield
        except Exception as error:  # storage layers raise many types
            self._failed = True
            if _is_interrupted(error):
                raise KeyboardInterrupt from None
            found = next((words for words in DISK_ERRORS if words in str(error)), None)
            remedy = DISK_ERRORS.get(found, "check this folder's storage")
            names = [folder.name for folder in self.folder.glob("[0-9]*")]
            kept = [int(name) for name in names if name.isdigit()]
            left = f"the last usable step is {max(kept)}" if kept else "there is no earlier one"
            raise CheckpointError(
                f"{self.folder}: could not write a checkpoint ({found or _first_line(error)}); "
                f"{left}; {remedy}, and run the same command again"
            ) from None

    def close(self) -> None:
        """Waits for a running save and frees the threads. Raises CheckpointError like `save`."""
        if not self._failed:  # after a failed write, closing would wait for it
            with self._writing():
                self._manager.close()

    # ------------------------------------------------------------------------------------- restore

    def meta(self, step: int) -> dict:
        """The metadata of a checkpoint.

        Raises:
            TornCheckpointError: it is unreadable, or differs from what was written.
            CheckpointError: it was written by an incompatible version.
        """
        with self._advising(step):
            return self._meta(step)

    def _meta(self, step: int) -> dict:
        return checkpoint_meta.read(self.folder / str(step))

    @contextlib.contextmanager
    def _advising(self, step: int) -> Iterator[None]:
        """Adds to the error of a damaged checkpoint which other step can be used."""
        try:
            yield
        except TornCheckpointError as error:
            others = [other for other in reversed(self.steps()) if other != step]
            intact = next(filter(self._is_intact, others), None)
            if intact is None:
                raise TornCheckpointError(f"{error}; no other step is intact") from None
            raise TornCheckpointError(
                f"{error}; step {intact} is intact: choose it (--step={intact}; in eval.py "
                f"--checkpoint={intact}), or move the damaged folder away"
            ) from None

    def _is_intact(self, step: int) -> bool:
        """Whether a checkpoint's parameters can be read, in the shapes in which they were saved."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            shapes = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
                for path, leaf in self._saved_arrays(step).items()
            }
            self._restore(step, {"params": shapes})
        except CheckpointError:
            return False
        return True

    def check_bases(self, step: int, found: Mapping[str, str], accept: bool = False) -> None:
        """Raises CheckpointError if the checkpoint was trained on other pretrained weights.

        `found` are the fingerprints of the config's; with `accept`, it only warns.
        """
        for name, fingerprint in self.meta(step)["bases"].items():
            if fingerprint != found[name]:
                message = (
                    f"{self.folder / str(step)}: trained on different {name} weights "
                    f"({fingerprint}; config.base.{name} has {found[name]}); "
                )
                if not accept:
                    advice = "use the same weights, a new --workdir to train, or --other_bases"
                    raise CheckpointError(message + advice)
                logging.warning("%sanswers may be worse than its reported scores", message)

    def restore_params(self, step: int, abstract: Mapping) -> dict[str, jax.Array]:
        """{path: array} in the shapes, dtypes and shardings of `abstract`.

        Raises:
            TornCheckpointError: the checkpoint is damaged; the message names an intact step.
            CheckpointError: it does not fit.
        """
        with self._advising(step):
            return self._restore(step, {"params": dict(abstract)})["params"]

    def restore(self, step: int, params: Mapping, train: Mapping) -> tuple[dict, dict]:
        """Parameters and training state in the given shapes, dtypes and shardings.

        The training state of a checkpoint that has none, such as an imported one, is {}.
        """
        items = {"params": dict(params)}
        if "train" in self._meta(step)["checksums"]:
            items["train"] = dict(train)
        restored = self._restore(step, items)
        return restored["params"], restored.get("train", {})

    def restore_latest(
        self, params: Mapping, train: Mapping, config: ConfigDict | None = None
    ) -> tuple[int, dict, dict, dict] | None:
        """(step, params, train, meta) of the newest intact checkpoint; None if there are none.

        Damaged checkpoints are skipped with an error message and renamed to STEP.torn, so that
        their steps can be saved again.

        Args:
            config: of the run, to name what has changed if the checkpoint does not fit it.

        Raises:
            CheckpointError: a checkpoint does not fit the config, or all of them are damaged.
        """
        errors = {}
        for step in reversed(self.steps()):
            restored, error = None, None
            try:
                restored = step, *self.restore(step, params, train), self._meta(step)
            except TornCheckpointError as torn:
                error = str(torn)
            except CheckpointError as other:
                changes = differences(self._meta(step)["config"], config) if config else []
                if not changes:
                    raise
                raise CheckpointError(
                    f"{self.folder}: {'; '.join(changes)}; use the former values, or a new "
                    f"--workdir ({other})"
                ) from None
            if _on_every_process(restored is not None):
                self._set_aside(list(errors))
                return restored
            errors[step] = error or "another process cannot read it"
            logging.error(
                "checkpoint %s is unreadable, trying the previous one: %s",
                self.folder / str(step),
                errors[step],
            )
        if errors:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in errors.items())
            raise CheckpointError(
                f"{self.folder}: all checkpoints are unreadable ({reasons[:400]}); remove the "
                "folder to start over"
            )
        return None

    def _restore(self, step: int, abstract: Mapping[str, Mapping]) -> dict[str, dict]:
        """Reads items of a checkpoint.

        Raises:
            TornCheckpointError: it is damaged.
            CheckpointError: it has other arrays than `abstract`, or the storage fails.
        """
        where, sums = self.folder / str(step), self._meta(step)["checksums"]
        self._check_fit(step, abstract, sums)
        items = ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        )
        with self._reading(step):
            restored = self._manager.restore(step, args=items)
        for name in abstract:
            if wrong := changed(restored[name], sums[name]):
                raise TornCheckpointError(
                    f"{where}: {name} {wrong[0]} does not match its checksum "
                    f"({len(wrong)} such arrays): the file is damaged"
                )
        return restored

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns any error of the storage into a CheckpointError."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):  # too large for this machine
            raise
        except Exception as error:  # storage layers raise many types for a damaged file
            if _is_interrupted(error):
                raise KeyboardInterrupt from None
            where, reason = self.folder / str(step), _first_line(error)
            if any(words in str(error) for words in DISK_ERRORS):
                raise CheckpointError(f"{where}: could not be read ({reason})") from None
            raise TornCheckpointError(f"{where}: could not be read ({reason})") from None

    def _saved_arrays(self, step: int) -> Mapping[str, ocp.metadata.value.ArrayMetadata]:
        """{path: metadata} of a checkpoint's parameters."""
        with self._reading(step):
            saved = ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "params")
            return dict(saved)

    def _check_fit(
        self, step: int, abstract: Mapping[str, Mapping], sums: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Raises CheckpointError if the arrays of a sound checkpoint are others than `abstract`."""
        where = self.folder / str(step)
        for item, tree in abstract.items():
            kind = "parameter" if item == "params" else "training state"
            expected = leaf_paths(tree)
            for path in sorted(set(sums.get(item, ())) ^ set(expected)):
                side = "is not in this config's model" if path not in expected else "is missing"
                raise CheckpointError(
                    f"{where}: {kind} {path} {side}; is it a checkpoint of this config?"
                )
        saved = self._saved_arrays(step)
        if damaged := sorted(set(saved) ^ set(abstract["params"])):
            raise TornCheckpointError(f"{where}: the file of parameter {damaged[0]} is damaged")
        for path, leaf in abstract["params"].items():
            if tuple(leaf.shape) != tuple(saved[path].shape):
                raise CheckpointError(
                    f"{where}: parameter {path} is {tuple(saved[path].shape)}, this config's is "
                    f"{tuple(leaf.shape)}"
                )

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                shutil.rmtree(self.folder / f"{step}.torn", ignore_errors=True)
                (self.folder / str(step)).rename(self.folder / f"{step}.torn")
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is the cause: asyncio cancels what runs, and Orbax wraps that."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _on_every_process(is_true: bool) -> bool:
    if jax.process_count() == 1:
        return is_true
    return bool(np.all(multihost_utils.process_allgather(np.array(is_true))))
