"""Multi-process runs: start-up, checks that all processes agree, rows, coordinated preemption.

Every process runs the same command. JAX detects the processes on TPU pods, SLURM, GKE and Open MPI;
elsewhere, pass --coordinator, --num_processes and --process_id.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import signal
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fastslm_jax.errors import UserError

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


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
        check_device_counts([device.process_index for device in jax.devices()])


# -------------------------------------------------------------------------- do the processes agree?


def check_device_counts(owners: list[int]) -> None:
    """Checks that all processes have equally many devices.

    Args:
        owners: the process of each device.

    Raises:
        UserError: they do not; every process raises the same.
    """
    counts = collections.Counter(owners)
    usual = collections.Counter(counts.values()).most_common(1)[0][0]
    for process, count in sorted(counts.items()):
        if count != usual:
            like = min(process for process, other in counts.items() if other == usual)
            raise UserError(
                f"process {process} has {count} devices, and process {like} has {usual}: all "
                "processes need the same number; look for a broken device, or at the cluster's "
                "settings"
            )


def gather(text: str) -> list[str]:
    """The text of every process, in their order. Every process must call it."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(max(1, *lengths), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def check_equal(facts: Mapping[str, object]) -> None:
    """Checks that a run's processes agree. Every process must call it, at the same place.

    Args:
        facts: {name: value that JSON can store}.

    Raises:
        UserError: they do not; every process raises the same. The message names a process, and
            what differs from most others.
    """
    if message := difference(gather(json.dumps(facts, sort_keys=True, default=str))):
        raise UserError(f"{message}; start every process with the same command, code and data")


def difference(facts: list[str]) -> str:
    """How processes differ from most others; "" if all are equal.

    Args:
        facts: of each process, as JSON. Of several processes that differ, those of the first count.

    Example: "process 3 differs from process 0: config.seed is 1 and not 0".
    """
    usual = collections.Counter(facts).most_common(1)[0][0]
    others = [process for process, text in enumerate(facts) if text != usual]
    if not others:
        return ""
    expected, found = json.loads(usual), json.loads(facts[others[0]])
    names = [name for name in expected | found if expected.get(name) != found.get(name)]
    parts = [
        f"{name} is {_shown(found.get(name))} and not {_shown(expected.get(name))}"
        for name in names[:3]
    ]
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    listed = ", ".join(map(str, others[:8])) + (", …" if len(others) > 8 else "")
    who = f"processes {listed} differ" if len(others) > 1 else f"process {listed} differs"
    return f"{who} from process {facts.index(usual)}: {', '.join(parts)}{more}"


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def software() -> dict[str, str]:
    """{name: version} of what a run depends on; of this package, a hash of its source files."""
    digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in _PACKAGES}
    return {"the code of fastslm_jax": digest.hexdigest()[:12]} | versions


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """If the code inside fails on one process, all processes raise its error.

    Otherwise the others would wait for it. Every process must enter it, and the code inside must
    not wait for other processes.
    """
    error = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
    errors = gather("" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for process, text in enumerate(errors):
        if text:
            raise UserError(f"process {process}: {text}")


# ------------------------------------------------------------------------------------------- rows


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


# ------------------------------------------------------------------------------------- preemption


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
