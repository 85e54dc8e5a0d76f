"""Detection of repetition loops: an answer whose end repeats itself.

An answer ends in a loop if, for some period of up to PERIODS tokens, its last tokens equal those
one period earlier for REPEATS - 1 periods and at least MIN_TOKENS tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

PERIODS = 64
REPEATS = 4
MIN_TOKENS = 24
_THRESHOLDS = np.maximum(MIN_TOKENS, (REPEATS - 1) * np.arange(1, PERIODS + 1))


def start(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The state of empty answers: last tokens, newest first, and matches so far by period.

    Both [rows, PERIODS].
    """
    return np.full((rows, PERIODS), -1, np.int32), np.zeros((rows, PERIODS), np.int32)


def advance(
    recent: jax.Array, repeated: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds a token [rows]; returns the next state (recent, repeated) and which rows loop [rows]."""
    repeated = jnp.where(recent == token[:, None], repeated + 1, 0)
    recent = jnp.concatenate([token[:, None], recent[:, :-1]], axis=1)
    return recent, repeated, jnp.any(repeated >= _THRESHOLDS, axis=1)


def without_repeats(tokens: Sequence[int]) -> tuple[int, ...]:
    """Cuts a loop at the end of tokens down to its first period."""
    tokens = tuple(tokens)
    for period in range(1, min(PERIODS, len(tokens) - 1) + 1):
        repeated = 0
        while (
            repeated + period < len(tokens)
            and tokens[-1 - repeated] == tokens[-1 - repeated - period]
        ):
            repeated += 1
        if repeated >= _THRESHOLDS[period - 1]:
            return tokens[: len(tokens) - repeated]
    return tokens
