"""The opening lines of a benchmark: what it compares, and on which device."""

import subprocess
import sys

from fastslm_jax import devices

DEVICE_KIND = "import jax; print(jax.devices()[0].device_kind)"


def print_banner(compared: str, device: str | None = None) -> None:
    """Prints what is compared, the device kind and the core count.

    Args:
        compared: one sentence.
        device: the device kind. None: ask JAX, in a child process, because some benchmarks must not
            occupy an accelerator that their own child processes need.
    """
    if device is None:
        command = [sys.executable, "-c", DEVICE_KIND]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        device = child.stdout.splitlines()[-1]
    print(f"{compared}\nDevice: {device}, {devices.cores()} CPU cores.", flush=True)
