"""A start for the HFQ-Former that already looks along the time axis; the module and its parameters stay what they are.

At the authors' start (queries of small random numbers) every query attends to the whole window alike, so that the speech tokens
of a window differ little from one another, and stand out from the language model's embeddings by their size. Where to look is
then learnt first, and slowly. Here query i reads the i-th of equal spans of the first level, tokens keep the order of time, the
residual branches start small, and the tokens are about as large as embeddings. Everything is trained from there.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.models.layers import sinusoids

# The sharpness of attention at the start, of the levels and of the distillation (whose keys are fewer and closer); the share of
# content in the keys; the size of residual branches and of tokens.
LEVEL_GAIN, DISTILLATION_GAIN, CONTENT, BRANCH, TOKEN = 3.0, 8.0, 0.3, 0.1, 0.1


def temporal_query_init(hfq_former: Mapping, rng: jax.Array) -> dict:
    """Fresh parameters of `HFQFormer` → the same tree, started in time."""
    rngs = iter(jax.random.split(rng, len(hfq_former)))
    part = hfq_former["compressor_1"]["query"].shape[0]
    started = {}
    for name, leaves in hfq_former.items():
        key = next(rngs)
        if name.startswith("compressor_"):
            started[name] = _compressor(
                leaves, leaves["context_positions"].shape[0], LEVEL_GAIN, key
            )
        elif name == "semantic_distillation":
            started[name] = _compressor(leaves, part, DISTILLATION_GAIN, key)
        elif name.startswith("detail_recovery_"):
            started[name] = {
                **leaves,
                **{kind: _branch(leaves[kind]) for kind in ("self_attention", "cross_attention")},
            }
        elif name == "projection":
            started[name] = {**leaves, "kernel": _orthogonal(key, leaves["kernel"], TOKEN)}
        else:
            started[name] = leaves
    return started


def _compressor(leaves: Mapping, part: int, gain: float, key: jax.Array) -> dict:
    """Queries match the keys at the centres of equal spans of the first `part` positions of the context."""
    num_queries, width = leaves["query"].shape
    positions = sinusoids(leaves["context_positions"].shape[0], width)
    positions -= positions.mean(axis=0)  # what all keys share tells nothing
    centres = np.maximum((np.arange(num_queries) + 0.5) / num_queries * part - 0.5, 0)
    below = centres.astype(int)
    fraction = (centres - below)[:, None]
    target = (1 - fraction) * positions[below] + fraction * positions[
        np.minimum(below + 1, part - 1)
    ]
    own = sinusoids(num_queries, width)  # added to the normalised query
    query = target / target.std(axis=1, keepdims=True) - (own - own.mean(axis=0)) / gain
    return {
        **leaves,
        "query": jnp.asarray(query, leaves["query"].dtype),
        "query_norm": {
            **leaves["query_norm"],
            "scale": jnp.full_like(leaves["query_norm"]["scale"], gain),
        },
        "context_norm": {
            **leaves["context_norm"],
            "scale": jnp.full_like(leaves["context_norm"]["scale"], CONTENT),
        },
        "out": {**leaves["out"], "kernel": _orthogonal(key, leaves["out"]["kernel"], 1 / CONTENT)},
    }


def _branch(attention: Mapping) -> dict:
    out = attention["out"]
    return {**attention, "out": {**out, "kernel": BRANCH * out["kernel"]}}


def _orthogonal(key: jax.Array, kernel: jax.Array, scale: float) -> jax.Array:
    return jax.nn.initializers.orthogonal(scale)(key, kernel.shape, kernel.dtype)
