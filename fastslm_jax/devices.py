"""What the device has: its name, cores, free memory, and the most that was in use."""

import os
import pathlib
import resource

import jax


def name() -> str:
    return jax.local_devices()[0].device_kind


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes free on a device of this process (on a CPU: of the machine); None where the system does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = pathlib.Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def peak_memory_gib() -> float:
    """The most memory in use so far: of the fullest device, or of this process on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    if peaks and jax.default_backend() != "cpu":
        return round(max(peaks) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
