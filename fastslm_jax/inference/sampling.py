"""Choice of the next token: greedy, or sampled with the logits processors of `transformers`.

The processors are applied in the same order: repetition penalty, temperature, top-k, top-p.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from fastslm_jax.errors import UserError

_MAX_INT = 2**31 - 1  # of a program's int32 inputs


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling settings; the default is greedy decoding.

    temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 have no effect. The same
    seed gives the same answers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        limits = {
            "temperature": (0 <= self.temperature < float("inf"), "at least 0"),
            "top_k": (0 <= self.top_k <= _MAX_INT, f"at least 0, at most {_MAX_INT}"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (-_MAX_INT <= self.seed <= _MAX_INT, f"at most {_MAX_INT}"),
        }
        for name, (is_valid, needed) in limits.items():
            if not is_valid:
                raise UserError(f"--{name}={getattr(self, name)}: must be {needed}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1

    def controls(self) -> "Controls":
        temperature = self.temperature or 1.0
        return Controls(temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)


class Controls(struct.PyTreeNode):
    """`SamplingParams` as inputs of a compiled program, so that a change does not recompile it."""

    temperature: jax.Array | float
    top_k: jax.Array | int
    top_p: jax.Array | float
    repetition_penalty: jax.Array | float
    seed: jax.Array | int


def penalize_repetition(
    logits: jax.Array, seen: jax.Array, penalty: jax.Array | float
) -> jax.Array:
    """Divides the logits [b, v] of seen tokens by the penalty, or multiplies negative ones.

    Source: arXiv 1909.05858.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: jax.Array, k: jax.Array | int) -> jax.Array:
    """Sets all but the k highest logits of a row to −∞; keeps ties with the k-th. 0 keeps all."""
    size = logits.shape[-1]
    lowest = jnp.take(
        jnp.sort(logits, axis=-1, descending=True), jnp.clip(k, 1, size) - 1, axis=-1
    )[..., None]
    return jnp.where((logits < lowest) & (k > 0), -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """Keeps the fewest highest logits of a row whose probabilities sum to at least p; keeps ties.

    Source: nucleus sampling, arXiv 1904.09751.
    """
    ascending = jnp.sort(logits, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    below = below.at[..., -1].set(False)  # the highest always stays
    lowest = jnp.min(jnp.where(below, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where((logits < lowest) & (p < 1), -jnp.inf, logits)


def warp(logits: jax.Array, controls: Controls) -> jax.Array:
    """Applies temperature, then top-k, then top-p."""
    return keep_top_p(keep_top_k(logits / controls.temperature, controls.top_k), controls.top_p)


def choose(
    logits: jax.Array,
    seen: jax.Array | None,
    controls: Controls,
    streams: jax.Array,
    counts: jax.Array,
    *,
    greedy: bool,
) -> jax.Array:
    """Next tokens [b] int32 from float32 logits [b, v].

    Args:
        seen: [b, v], tokens that the repetition penalty acts on; None: no penalty.
        streams, counts: [b], numbers of the request and of the token, which seed a row's draw
            independently of the other rows.
    """
    if seen is not None:
        logits = penalize_repetition(logits, seen, controls.repetition_penalty)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = warp(logits, controls)

    def draw(row: jax.Array, stream: jax.Array, count: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(controls.seed), stream), count)
        return jax.random.categorical(key, row)

    return jax.vmap(draw)(logits, streams, counts).astype(jnp.int32)
