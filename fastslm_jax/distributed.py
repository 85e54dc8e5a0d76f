"""Multi-process runs: start-up, the rows of each process, and coordinated preemption.

Every process runs the same command. JAX detects the processes on TPU pods, SLURM, GKE and Open MPI;
elsewhere, pass --coordinator, --num_processes and --process_id.
"""

import contextlib
import os
import signal

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fastslm_jax.errors import UserError

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects the processes of a run; without a cluster, the run has one process.

    Call it before anything that uses a device.

    Raises:
        UserError: the flags are inconsistent, or the processes cannot connect.
    """
    given = [coordinator, num_processes, process_id]
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError(
                "--coordinator, --num_processes and --process_id must be set together; "
                "on a detected cluster, set none of them"
            )
        if not 0 <= process_id < num_processes or ":" not in coordinator:
            raise UserError(
                f"--coordinator={coordinator} --num_processes={num_processes} "
                f"--process_id={process_id}: the coordinator must be HOST:PORT and the process id "
                "must be from 0 to num_processes - 1"
            )
        try:
            jax.distributed.initialize(
                coordinator, num_processes, process_id, cluster_detection_method="deactivate"
            )
        except RuntimeError as error:
            raise UserError(
                f"--coordinator={coordinator}: the processes could not connect ({error})"
            ) from None
    elif os.environ.get("JAX_PLATFORMS", "") != "cpu":
        try:
            jax.distributed.initialize()
        except ValueError:  # no cluster was detected
            return
    if jax.process_count() > 1:
        logging.info("process %d of %d", jax.process_index(), jax.process_count())
        if jax.process_index():
            logging.set_verbosity(logging.WARNING)  # only process 0 logs information


def rows_of_process(mesh: Mesh) -> tuple[int, int]:
    """Returns (part, parts): this process reads part number `part` of a batch's rows.

    The rows are split into `parts` equal parts. Processes whose devices differ only in their
    tensor coordinate read the same rows.

    Raises:
        UserError: the rows of two processes overlap without being equal.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(-1, mesh.devices.shape[-1])  # [data × fsdp, tensor]
    rows = {
        process: frozenset(np.flatnonzero((owners == process).any(axis=1)))
        for process in np.unique(owners).tolist()
    }
    groups = sorted(set(rows.values()), key=min)
    if sum(map(len, groups)) != len(owners) or len(set(map(len, groups))) != 1:
        raise UserError(
            f"config.mesh {dict(mesh.shape)}: the rows of some processes overlap only partly; "
            "choose a config.mesh.tensor that divides the number of devices per process or is a "
            "multiple of it"
        )
    return groups.index(rows[jax.process_index()]), len(groups)


class Preemption:
    """Handles SIGTERM for the whole run: if one process receives it, all stop at the same step.

    From `accept_interrupts` on, Ctrl-C (SIGINT) does the same. A second Ctrl-C ends the run at
    once.

    Attributes:
        signal: the signal that this process received; None if there was none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._former = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._on_signal)
        # With several processes, the JAX runtime handles the signal and agrees on a step.

    def accept_interrupts(self) -> None:
        """Call it when there is something to save; until then Ctrl-C ends the run at once."""
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(OSError):  # not print: the signal may have interrupted one
                os.write(2, b"\nCtrl-C: saving after this step; Ctrl-C again stops at once\n")
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)  # tells the other processes

    def close(self) -> None:
        """Restores the former signal handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to save and stop at this step. Every process must call it at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None
