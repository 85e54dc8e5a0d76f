"""What a process knows of its devices and of its compilations."""

import jax
import jax.numpy as jnp

from fastslm_jax import devices


def test_compilations_are_counted():
    double = jax.jit(lambda x: 2 * x)
    x, y = jnp.zeros(3), jnp.zeros(4)
    before = devices.compiled_so_far()
    double(x)
    first = devices.compiled_so_far() - before
    double(x)  # already compiled
    assert devices.compiled_so_far() - before == first
    double(y)  # another shape
    assert first.programs == 1
    assert (devices.compiled_so_far() - before).programs == 2
    assert 0 < first.seconds < (devices.compiled_so_far() - before).seconds
