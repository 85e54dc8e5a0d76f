"""How the next token is chosen from logits: the processors of `transformers`, in its order, and greedy or random choice."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from fastslm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0, top_p 1 and repetition_penalty 1 do nothing. The same seed gives the same answers."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if (
            self.temperature < 0
            or self.top_k < 0
            or not 0 < self.top_p <= 1
            or self.repetition_penalty <= 0
        ):
            raise UserError(
                f"sampling: temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, repetition_penalty "
                f"{self.repetition_penalty}; needed are temperature ≥ 0, top_k ≥ 0, 0 < top_p ≤ 1, repetition_penalty > 0"
            )

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
    """The numbers of a `SamplingParams` as inputs of a compiled program, which does not depend on them."""

    temperature: jax.Array | float
    top_k: jax.Array | int
    top_p: jax.Array | float
    repetition_penalty: jax.Array | float
    seed: jax.Array | int


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty) -> jax.Array:
    """Logits [b, v] of tokens seen [b, v] are divided by the penalty, or multiplied where negative (arXiv 1909.05858)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: jax.Array, k) -> jax.Array:
    """All but the k highest logits of a row become −∞; equals of the lowest kept stay. k 0: all stay."""
    size = logits.shape[-1]
    lowest = jnp.take(
        jnp.sort(logits, axis=-1, descending=True), jnp.clip(k, 1, size) - 1, axis=-1
    )[..., None]
    return jnp.where((logits < lowest) & (k > 0), -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p) -> jax.Array:
    """Keeps the fewest highest logits of a row whose probabilities add up to p (arXiv 1904.09751), equals of the lowest too."""
    ascending = jnp.sort(logits, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    below = below.at[..., -1].set(False)  # the best one always stays
    lowest = jnp.min(jnp.where(below, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where((logits < lowest) & (p < 1), -jnp.inf, logits)


def warp(logits: jax.Array, controls: Controls) -> jax.Array:
    """Logits as the random choice takes them: divided by the temperature, then top-k, then top-p."""
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
        seen: [b, v], what the repetition penalty acts on; None: no penalty.
        streams, counts: [b], which random numbers a row takes: those of its request and of its token's number, whatever
            other rows there are.
    """
    if seen is not None:
        logits = penalize_repetition(logits, seen, controls.repetition_penalty)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = warp(logits, controls)

    def draw(row, stream, count):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(controls.seed), stream), count)
        return jax.random.categorical(key, row)

    return jax.vmap(draw)(logits, streams, counts).astype(jnp.int32)
