"""Repetition loops: detected on the device token by token, and cut to their first period."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax.inference import repetition


def found_after(tokens) -> int | None:
    """Number of tokens until a loop is detected; None: never."""
    padded = np.full(1024, -1) - np.arange(1024)  # numbers that never repeat
    padded[: len(tokens)] = tokens[: len(padded)]
    looped = np.asarray(scan(np.stack([padded, -2000 - np.arange(1024)], axis=1)))
    assert not looped[:, 1].any()
    return int(looped[:, 0].argmax()) + 1 if looped.any() else None


@jax.jit
def scan(tokens):
    """tokens [steps, rows] → whether each row is in a loop [steps, rows]."""

    def step(carry, token):
        *carry, looped = repetition.advance(*carry, token)
        return tuple(carry), looped

    return jax.lax.scan(step, tuple(jnp.asarray(part) for part in repetition.start(2)), tokens)[1]


START = [900, 901, 902]


@pytest.mark.parametrize(
    ("period", "length"),
    [(1, 3 + 1 + 24), (2, 3 + 2 + 24), (8, 3 + 8 + 24), (10, 3 + 40), (64, 3 + 4 * 64)],
)
def test_a_repeated_phrase_is_found_and_cut_to_one_period(period, length):
    tokens = START + list(range(period)) * 60
    assert found_after(tokens) == length
    assert repetition.without_repeats(tokens[:length]) == tuple(START + list(range(period)))


@pytest.mark.parametrize(
    "tokens",
    [
        START + [7] * 24,
        START + list(range(10)) * 3 + [1, 2, 3],
        START + list(range(65)) * 8,  # longer than any detected period
        np.random.default_rng(0).integers(0, 3, 1000).tolist(),
    ],
)
def test_short_repetitions_are_not_loops(tokens):
    assert found_after(tokens) is None
    assert repetition.without_repeats(tokens) == tuple(tokens)
