"""Orbax checkpoints of a working directory.

    WORKDIR/checkpoints/STEP/params   {path: array}; frozen pretrained weights are left out
                             train    optimizer state and counters
                             meta     config, row number, fingerprints, checksums

The config names the frozen pretrained weights, and a fingerprint verifies that they are the same.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from fastslm_jax.errors import UserError
from fastslm_jax.training.checksums import changed, checksums

FORMAT = 2
DISK_ERRORS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "Read-only",
    "Permission denied",
)
# Fields of a config that may change on resume without a warning: none of them affects training.
FREE_FIELDS = (
    "name",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "mesh",
    "max_skipped",
    "eval",
    "profile",
)


class CheckpointError(UserError):
    """A checkpoint, or a folder of checkpoints, that cannot be used."""


class TornCheckpointError(CheckpointError):
    """A checkpoint that is damaged or incomplete."""


def lock(workdir: str | os.PathLike, work: str = "training") -> TextIO:
    """Locks a working directory until this process ends or the returned file is closed.

    Raises:
        UserError: another process holds the lock.
    """
    path = pathlib.Path(workdir) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115 (the lock lasts as long as the file is open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"{workdir}: another process is {work} there; wait for it, or use another --workdir"
        ) from None
    return file


class Checkpoints:
    """The checkpoints of a working directory. Saves are asynchronous.

    Keeps the last `keep` checkpoints and the best one: the lowest dev WER, or CER if the dev set
    has no WER.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, keep: int = 2, read_only: bool = False
    ) -> None:
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"{workdir}: no checkpoints; train there first, or use another --workdir"
            )
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: -_error_rate(metrics),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(n=keep), best]
            ),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were interrupted by a kill
        )
        self._failed = False
        with contextlib.nullcontext() if read_only else self._writing():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    # ---------------------------------------------------------------------------------------- save

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        train: Mapping,
        meta: Mapping,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts an atomic save. Does nothing if the step is already saved.

        Args:
            train: optimizer state and counters; {} for an imported checkpoint.
            metrics: dev scores.

        Raises:
            CheckpointError: this save, or the one still running, failed.
        """
        if step in self._manager.all_steps():
            return
        items = {"params": ocp.args.StandardSave(dict(params))}
        meta = {"format": FORMAT, **meta, "checksums": {"params": checksums(dict(params))}}
        if train:
            items["train"] = ocp.args.StandardSave(dict(train))
            meta["checksums"]["train"] = checksums(dict(train))
        items["meta"] = ocp.args.JsonSave(meta | {"crc32": _crc32(meta)})
        if metrics is not None and _error_rate(metrics) is None:
            metrics = None
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

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
            lines = (str(error) or type(error).__name__).splitlines()
            reason = next((words for words in DISK_ERRORS if words in str(error)), lines[0][:300])
            kept = [
                int(folder.name) for folder in self.folder.glob("[0-9]*") if folder.name.isdigit()
            ]
            left = f"the last usable step is {max(kept)}" if kept else "there is no earlier one"
            raise CheckpointError(
                f"{self.folder}: could not write a checkpoint ({reason}); {left}. Free some space "
                "and run the same command again"
            ) from None

    def close(self) -> None:
        if not self._failed:  # after a failed write, closing would wait for it
            self._manager.close()

    # ------------------------------------------------------------------------------------- restore

    def meta(self, step: int) -> dict:
        """The metadata of a checkpoint.

        Raises:
            TornCheckpointError: it is unreadable, or differs from what was written.
            CheckpointError: it was written by an incompatible version.
        """
        try:
            meta = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
            expected = meta.pop("crc32")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise TornCheckpointError(
                f"{self.folder / str(step)}: unreadable meta ({error})"
            ) from None
        if expected != _crc32(meta):
            raise TornCheckpointError(f"{self.folder / str(step)}: meta does not match its crc32")
        if meta["format"] != FORMAT:
            raise CheckpointError(
                f"{self.folder / str(step)}: has format {meta['format']}, this version reads "
                f"{FORMAT}; use the version that wrote it"
            )
        return meta

    def check_bases(self, step: int, fingerprints: Mapping[str, str]) -> None:
        """Checks that the config's pretrained weights are those of the checkpoint.

        Raises:
            CheckpointError: they differ.
        """
        for name, fingerprint in self.meta(step)["bases"].items():
            if fingerprint != fingerprints[name]:
                raise CheckpointError(
                    f"{self.folder / str(step)}: trained on different {name} weights "
                    f"({fingerprint}; config.base.{name} has {fingerprints[name]}); use the same "
                    "weights, or a new --workdir"
                )

    def restore_params(self, step: int, abstract: Mapping) -> dict[str, jax.Array]:
        """{path: array} in the shapes, dtypes and shardings of `abstract`."""
        return self._restore(step, {"params": dict(abstract)})["params"]

    def restore(self, step: int, params: Mapping, train: Mapping) -> tuple[dict, dict]:
        """Parameters and training state in the given shapes, dtypes and shardings.

        The training state of an imported checkpoint is {}.
        """
        items = {"params": dict(params)}
        if "imported" not in self.meta(step):
            items["train"] = dict(train)
        restored = self._restore(step, items)
        return restored["params"], restored.get("train", {})

    def restore_latest(
        self, params: Mapping, train: Mapping
    ) -> tuple[int, dict, dict, dict] | None:
        """(step, params, train, meta) of the newest intact checkpoint; None if there are none.

        Damaged checkpoints are skipped with an error message and renamed to STEP.torn, so that
        their steps can be saved again.

        Raises:
            CheckpointError: a checkpoint does not fit the config, or all of them are damaged.
        """
        errors = {}
        for step in reversed(self.steps()):
            restored, error = None, None
            try:
                restored = step, *self.restore(step, params, train), self.meta(step)
            except Exception as raised:  # storage layers raise many types for a damaged file
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
        self._check_shapes(step, abstract["params"])
        items = ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        )
        restored = self._manager.restore(step, args=items)
        saved = self.meta(step)["checksums"]
        for name in abstract:
            if wrong := changed(restored[name], saved[name]):
                raise TornCheckpointError(
                    f"{self.folder / str(step)}: {name} {wrong[0]} does not match its checksum "
                    f"({len(wrong)} such arrays): the file is damaged"
                )
        return restored

    def _check_shapes(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        where = self.folder / str(step)
        saved = ocp.StandardCheckpointer().metadata(where / "params").item_metadata
        saved = {name: tuple(leaf.shape) for name, leaf in dict(saved).items()}
        for path in sorted(set(saved) ^ set(abstract)):
            side = "is not in this config's model" if path in saved else "is missing"
            raise CheckpointError(
                f"{where}: parameter {path} {side}; is it a checkpoint of this config?"
            )
        for path, leaf in abstract.items():
            if tuple(leaf.shape) != saved[path]:
                raise CheckpointError(
                    f"{where}: parameter {path} is {saved[path]}, this config's is "
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


def _error_rate(metrics: Mapping[str, float]) -> float | None:
    """The dev score that the best checkpoint minimizes."""
    return metrics.get("wer", metrics.get("cer"))


def _crc32(meta: Mapping) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _on_every_process(is_true: bool) -> bool:
    if jax.process_count() == 1:
        return is_true
    return bool(np.all(multihost_utils.process_allgather(np.array(is_true))))


# ------------------------------------------------------------------------------------------ resume


def warn_of_changes(meta: Mapping, config: ConfigDict, data: Mapping[str, str]) -> None:
    """Warns about what has changed between a checkpoint and the run that resumes from it.

    Args:
        meta: of the checkpoint.
        config: of the run.
        data: {source: fingerprint of its manifest} of the run.
    """
    before, now = _flatten(meta["config"]), _flatten(json.loads(config.to_json_best_effort()))
    for field in sorted(set(before) | set(now)):
        if not field.startswith(FREE_FIELDS) and before.get(field) != now.get(field):
            logging.warning(
                "config.%s was %r before the resume and is now %r",
                field,
                before.get(field),
                now.get(field),
            )
    for name, fingerprint in data.items():
        if meta.get("data", {}).get(name, fingerprint) != fingerprint:
            logging.warning(
                "config.data.train.%s: the manifest has changed since the checkpoint was saved, "
                "so the rows from here on differ",
                name,
            )


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """Example: {"a": {"b": 1}} → {"a.b": 1}."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
