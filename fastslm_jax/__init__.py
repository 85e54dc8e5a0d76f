"""FastSLM in JAX.

`fastslm_jax.load(checkpoint)` returns a `Model`; see `fastslm_jax.inference.api`. The names are
imported on first use, so that `import fastslm_jax` is fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastslm_jax.inference.api import Model, load
    from fastslm_jax.inference.long_form import Result

__all__ = ["Model", "Result", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastslm_jax.inference import api

    return getattr(api, name)
