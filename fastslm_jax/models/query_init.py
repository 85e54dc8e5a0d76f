"""Initializes adapters with a temporal alignment prior (`query_init="temporal"`).

With the HFQ-Former authors' initialization (small random queries), every query attends uniformly
to the whole window. The speech tokens of a window are then almost equal and much larger than the
language model's embeddings, and training first has to learn where to attend, which is slow. With
the temporal initialization, query i attends to the i-th of equal spans of its level (in the
distillation, of the first stage's tokens), tokens are in temporal order, residual branches start
small, and tokens have about the scale of embeddings. The same holds for Q-Formers; of the adapters
without queries, only the scale of the tokens is initialized.
Only initial values change; the module and its parameter tree do not.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.models.layers import sinusoids

# Scale of the normalized queries, hence sharpness of attention: for the three levels, and for
# the distillation, whose keys are fewer and closer to each other.
LEVEL_GAIN, DISTILLATION_GAIN = 3.0, 8.0
CONTENT_SCALE = 0.3  # of the normalized context, relative to its position embeddings
BRANCH_SCALE = 0.1  # of the residual branches
TOKEN_SCALE = 0.1  # of the speech tokens
QUERY_SCALE = 0.1  # of a Q-Former's queries, relative to the content that they read


def temporal_query_init(hfq_former: Mapping, rng: jax.Array) -> dict:
    """Replaces the initial values of `HFQFormer` parameters with the temporal initialization."""
    rngs = iter(jax.random.split(rng, len(hfq_former)))
    first_stage_tokens = hfq_former["compressor_1"]["query"].shape[0]
    params = {}
    for name, leaves in hfq_former.items():
        key = next(rngs)
        if name.startswith("compressor_"):
            context = leaves["context_positions"].shape[0]
            params[name] = _compressor(leaves, context, LEVEL_GAIN, key)
        elif name == "semantic_distillation":
            # Its context is the concatenated stage tokens; attend to those of the first level.
            params[name] = _compressor(leaves, first_stage_tokens, DISTILLATION_GAIN, key)
        elif name.startswith("detail_recovery_"):
            attention = ("self_attention", "cross_attention")
            params[name] = {**leaves, **{part: _branch(leaves[part]) for part in attention}}
        elif name == "projection":
            params[name] = projection(leaves, key)
        else:
            params[name] = leaves
    return params


def qformer(params: Mapping, rng: jax.Array) -> dict:
    """Replaces the initial values of `SQFormer` and `WQFormer` parameters.

    In the first layer, queries and keys have one orthogonal projection, so that they match as in
    the HFQ-Former. Queries are small beside what they read: layer norms make their scale irrelevant
    for attention, and tokens start with content.
    """
    match_key, value_key, out_key, projection_key = jax.random.split(rng, 4)
    layers = {
        name: {
            **leaves,
            **{part: _branch(leaves[part]) for part in leaves if part.endswith("_attention")},
            "mlp_out": _scaled(leaves["mlp_out"]),
        }
        for name, leaves in params.items()
        if name.startswith("layer_")
    }
    kernels = {  # of the first layer: the key, and the scale of an orthogonal matrix
        "query": (match_key, 1.0),
        "key": (match_key, 1.0),
        "value": (value_key, 1.0),
        "out": (out_key, 1 / CONTENT_SCALE),
    }
    attention = params["layer_0"]["cross_attention"]
    layers["layer_0"] |= {
        "cross_norm": _with_scale(params["layer_0"]["cross_norm"], LEVEL_GAIN),
        "cross_attention": {
            name: {**attention[name], "kernel": _orthogonal(key, attention[name]["kernel"], scale)}
            for name, (key, scale) in kernels.items()
        },
    }
    context, width = params["context_positions"].shape
    target = _targets(len(params["query"]), context, context, width)
    return {
        **params,
        **layers,
        "query": jnp.asarray(QUERY_SCALE * target, params["query"].dtype),
        "context_norm": _with_scale(params["context_norm"], CONTENT_SCALE),
        "projection": projection(params["projection"], projection_key),
    }


def projection(leaves: Mapping, key: jax.Array) -> dict:
    """The last linear layer of an adapter, for tokens with about the scale of embeddings."""
    return {**leaves, "kernel": _orthogonal(key, leaves["kernel"], TOKEN_SCALE)}


def _targets(num_queries: int, span: int, context: int, width: int) -> np.ndarray:
    """Position embeddings at the centers of equal parts of the first `span` positions.

    [num_queries, width], each with a standard deviation of 1.
    """
    positions = sinusoids(context, width)
    positions -= positions.mean(axis=0)  # a component common to all keys has no effect
    centers = np.maximum((np.arange(num_queries) + 0.5) / num_queries * span - 0.5, 0)
    below = centers.astype(int)
    above = np.minimum(below + 1, span - 1)
    fraction = (centers - below)[:, None]
    target = (1 - fraction) * positions[below] + fraction * positions[above]
    return target / target.std(axis=1, keepdims=True)


def _compressor(leaves: Mapping, span: int, gain: float, key: jax.Array) -> dict:
    """Queries that match the keys at the centers of equal parts of the first `span` positions."""
    num_queries, width = leaves["query"].shape
    target = _targets(num_queries, span, leaves["context_positions"].shape[0], width)
    # The module adds these position embeddings to the normalized query; compensate for them.
    query_positions = sinusoids(num_queries, width)
    query_positions -= query_positions.mean(axis=0)
    query = target - query_positions / gain
    out = leaves["out"]
    identity = {  # of the optional projections
        name: {**part, "kernel": jnp.eye(width, dtype=part["kernel"].dtype)}
        for name, part in leaves.items()
        if name.endswith("_projection")
    }
    return {
        **leaves,
        **identity,
        "query": jnp.asarray(query, leaves["query"].dtype),
        "query_norm": _with_scale(leaves["query_norm"], gain),
        "context_norm": _with_scale(leaves["context_norm"], CONTENT_SCALE),
        "out": {**out, "kernel": _orthogonal(key, out["kernel"], 1 / CONTENT_SCALE)},
    }


def _with_scale(norm: Mapping, scale: float) -> dict:
    return {**norm, "scale": jnp.full_like(norm["scale"], scale)}


def _branch(attention: Mapping) -> dict:
    return {**attention, "out": _scaled(attention["out"])}


def _scaled(out: Mapping) -> dict:
    return {**out, "kernel": BRANCH_SCALE * out["kernel"]}


def _orthogonal(key: jax.Array, kernel: jax.Array, scale: float) -> jax.Array:
    return jax.nn.initializers.orthogonal(scale)(key, kernel.shape, kernel.dtype)
