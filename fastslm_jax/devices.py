"""Local devices: name, CPU cores, peak memory, and compilations so far."""

import dataclasses
import os
import resource

import jax

from fastslm_jax.memory import GIB


def name() -> str:
    """Kind of the first local device, such as "TPU v5 lite"."""
    return jax.local_devices()[0].device_kind


def cores() -> int:
    """CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_gib() -> float:
    """Peak memory so far, in GiB: of the fullest local device, or of this process on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks and jax.default_backend() != "cpu":
        return round(max(peaks) / GIB, 3)
    return round(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB, 3)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Number of compiled programs, and seconds spent lowering and compiling them."""

    programs: int = 0
    seconds: float = 0.0

    def __sub__(self, other: "Compiled") -> "Compiled":
        return Compiled(self.programs - other.programs, self.seconds - other.seconds)


_compiled = Compiled()


def _count(event: str, seconds: float, **_: object) -> None:
    global _compiled
    is_program = event.endswith("backend_compile_duration")
    if is_program or event.endswith("jaxpr_to_mlir_module_duration"):
        _compiled = Compiled(_compiled.programs + is_program, _compiled.seconds + seconds)


jax.monitoring.register_event_duration_secs_listener(_count)


def compiled_so_far() -> Compiled:
    """Compilations in this process since import; subtract two results for an interval."""
    return _compiled
