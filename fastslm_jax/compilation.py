"""How many programs this process has compiled, and the seconds that took (loading them from the persistent cache counts too)."""

import dataclasses

import jax

_STEPS = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")


@dataclasses.dataclass
class Compiled:
    programs: int = 0
    seconds: float = 0.0

    def __sub__(self, other: "Compiled") -> "Compiled":
        return Compiled(self.programs - other.programs, self.seconds - other.seconds)


_total = Compiled()


def _count(event: str, seconds: float, **_) -> None:
    if event.endswith(_STEPS):
        _total.seconds += seconds
    if event.endswith("backend_compile_duration"):
        _total.programs += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def so_far() -> Compiled:
    """Since this module was imported; take the difference of two."""
    return dataclasses.replace(_total)
