"""Several processes as one run, on JAX's own runtime: who they are, which rows each one reads, and when all of them stop.

Every process runs the same command. On a TPU pod, under SLURM, on GKE and under Open MPI, JAX finds the others by itself;
elsewhere the three flags say where they are.
"""

import os
import signal

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fastslm_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where the cluster is not detected."
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator.")
    flags.DEFINE_integer(
        "process_id", None, "Number of this process from 0 on, with --coordinator."
    )


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; without a cluster there is one. Call it before anything that uses a device.

    Raises:
        UserError: flags that do not fit together, or processes that do not find each other.
    """
    given = [coordinator, num_processes, process_id]
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError(
                "--coordinator, --num_processes and --process_id go together: give all three, or none on a cluster"
            )
        if not 0 <= process_id < num_processes or ":" not in coordinator:
            raise UserError(
                f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: the coordinator is "
                "HOST:PORT, processes are numbered from 0"
            )
        try:
            jax.distributed.initialize(
                coordinator, num_processes, process_id, cluster_detection_method="deactivate"
            )
        except RuntimeError as error:
            raise UserError(
                f"--coordinator={coordinator}: the processes did not find each other ({error})"
            ) from None
    elif os.environ.get("JAX_PLATFORMS", "") != "cpu":
        try:
            jax.distributed.initialize()
        except ValueError:  # what it raises where there is no cluster
            return
    if jax.process_count() > 1:
        logging.info("process %d of %d", jax.process_index(), jax.process_count())
        if jax.process_index():
            logging.set_verbosity(logging.WARNING)  # one process speaks, the others warn


def rows_of_process(mesh: Mesh) -> tuple[int, int]:
    """(part, parts): a batch's rows are cut into `parts` equal parts, and this process reads number `part`.

    Processes whose devices lie at the same places of data × fsdp (they differ in tensor only) read the same rows.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(-1, mesh.devices.shape[-1])  # [data × fsdp, tensor]
    places = {
        process: frozenset(np.flatnonzero((owners == process).any(axis=1)))
        for process in np.unique(owners).tolist()
    }
    groups = sorted(set(places.values()), key=min)
    if sum(map(len, groups)) != len(owners) or len(set(map(len, groups))) != 1:
        raise UserError(
            f"config.mesh {dict(mesh.shape)}: processes share some of their rows only; choose config.mesh.tensor as a divisor or "
            "a multiple of the devices of a process"
        )
    return groups.index(places[jax.process_index()]), len(groups)


class Preemption:
    """SIGTERM, as the whole run sees it: when one process gets it, all stop at the same step."""

    def __init__(self):
        self._signalled = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._note)
        # With several processes JAX's runtime takes the signal and agrees on a step.

    def _note(self, *_) -> None:
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Is this the step to save and stop at? All processes must ask at every step."""
        return self._signalled or (
            jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
        )
