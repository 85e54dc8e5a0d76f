"""Commands that run one after another; each completes once, even if it is interrupted."""

import contextlib
import json
import pathlib
import resource
import subprocess
import sys
import time

from fastslm_jax import outputs
from fastslm_jax.errors import UserError

# Ends the phase if this process is killed (Linux only; elsewhere train.py's lock protects it).
# Popen's preexec_fn would do it, but may deadlock when JAX's threads run.
_PROGRAM = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
_PROGRAM += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
_DIE_WITH_PARENT = ("-c", _PROGRAM) if sys.platform == "linux" else ()


class Phases:
    """Runs commands one after another, skipping those that are done.

    OUT/phases.json records which are done, and their time and peak memory over all attempts.
    """

    def __init__(self, out: pathlib.Path) -> None:
        self.out, self.file = out, out / "phases.json"
        self.state: dict[str, dict] = {}
        if self.file.exists():
            self.state = json.loads(self.file.read_text(encoding="utf-8"))

    def is_done(self, name: str, command: list[str]) -> bool:
        """Whether the phase has completed.

        Raises:
            UserError: it was previously run with a different command.
        """
        phase = self.state.get(name, {"done": False, "command": command})
        if phase["command"] != command:
            before = " ".join(phase["command"])
            raise UserError(
                f"{self.out} was created with other flags ({before}); "
                "choose another folder or delete it"
            )
        return phase["done"]

    def run(self, name: str, command: list[str], log: pathlib.Path | None = None) -> None:
        """Runs `python COMMAND` as the phase `name`.

        Args:
            log: file that the output is appended to; by default it is printed.

        Raises:
            UserError: the command failed, or the phase was previously run with a different command.
        """
        say = print if log is None else lambda *_, **__: None
        if self.is_done(name, command):
            say(f"[{name}] already done", flush=True)
            return
        phase = self.state.setdefault(
            name, {"done": False, "seconds": 0.0, "peak_rss_gib": 0.0, "command": command}
        )
        say(f"[{name}] python {' '.join(command)}", flush=True)
        before, started = phase["seconds"], time.time()
        with contextlib.nullcontext() if log is None else open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, *_DIE_WITH_PARENT, *command], stdout=output, stderr=output
            )
        while True:
            try:
                code = process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                code = None
            except KeyboardInterrupt:  # the phase received it too, and saves its state
                process.wait()
                raise
            phase["seconds"] = before + time.time() - started
            if code is not None:
                break
            self._write()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        phase["peak_rss_gib"] = round(max(phase["peak_rss_gib"], peak), 2)
        phase["done"] = code == 0
        self._write()
        if code:
            shown = "the error above" if log is None else f"the error at the end of {log}"
            raise UserError(
                f"{name} failed with exit code {code}; fix {shown} and run the same command again"
            )

    def _write(self) -> None:
        outputs.write_text(self.file, json.dumps(self.state, indent=1))
