"""Initializes adapters with a temporal alignment prior (`query_init="temporal"`).

With the HFQ-Former authors' initialization (small random queries), every query attends uniformly
to the whole window. The speech tokens of a window are then almost equal and much larger than the
language model's embeddings, and training first has to learn where to attend, which is slow.

With the temporal initialization, all position tables of the HFQ-Former read one clock: query i and
the frames of the i-th of equal spans have equal positions, and so have the tokens of all levels in
the distillation. Each query starts with nearly the mean of its span. Authors' tables have sines of
falling frequency, then cosines, so that most heads of a wide model get frequencies too low to tell
frames apart; these have all frequencies in every head. Residual branches start small, and tokens
have about the scale of embeddings. For Q-Formers, queries and scales are initialized so; of the
adapters without queries, only the scale of the tokens.
Only initial values change; the module and its parameter tree do not. Position tables are stored in
checkpoints and exports.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.models.layers import frequencies, sinusoids

# Sharpness of attention: of the three levels, and of the distillation, which has fewer keys.
LEVEL_GAIN, DISTILLATION_GAIN = 2.0, 3.0
SPAN_SMOOTHING = 0.4  # of attention to a level's frames, relative to the span of a query
LEVEL_CONTENT = 0.03  # of the normalized context, relative to its position embeddings
RECOVERY_SCALE = 0.01  # of the residual branches of detail recovery
TOKEN_SCALE = 0.1  # of the speech tokens
# Of Q-Formers: sharpness, content and branches as above, and queries relative to content.
QUERY_GAIN, CONTENT_SCALE, BRANCH_SCALE, QUERY_SCALE = 3.0, 0.3, 0.1, 0.1


def temporal_query_init(hfq_former: Mapping, rng: jax.Array, head_dim: int) -> dict:
    """Replaces the initial values of `HFQFormer` parameters with the temporal initialization."""
    rngs = iter(jax.random.split(rng, len(hfq_former)))
    levels = sorted(name for name in hfq_former if name.startswith("compressor_"))
    queries = [len(hfq_former[name]["query"]) for name in levels]
    params = {}
    for name, leaves in hfq_former.items():
        key = next(rngs)
        if name.startswith("compressor_"):
            frames = len(leaves["context_positions"])
            times = _centers(len(leaves["query"]), frames), np.arange(frames)
            smoothing = SPAN_SMOOTHING * frames / len(leaves["query"])
            params[name] = _compressor(leaves, times, LEVEL_GAIN, smoothing, head_dim, key)
        elif name == "semantic_distillation":
            # Its context is the concatenated tokens of the levels; the first level's are the unit.
            context = np.concatenate([_centers(count, queries[0]) for count in queries])
            times = _centers(len(leaves["query"]), queries[0]), context
            params[name] = _compressor(leaves, times, DISTILLATION_GAIN, 0.0, head_dim, key)
        elif name.startswith("detail_recovery_"):
            attention = ("self_attention", "cross_attention")
            params[name] = {
                **leaves,
                **{part: _branch(leaves[part], RECOVERY_SCALE) for part in attention},
            }
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
            **{
                part: _branch(leaves[part], BRANCH_SCALE)
                for part in leaves
                if part.endswith("_attention")
            },
            "mlp_out": _scaled(leaves["mlp_out"], BRANCH_SCALE),
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
        "cross_norm": _with_scale(params["layer_0"]["cross_norm"], QUERY_GAIN),
        "cross_attention": {
            name: {**attention[name], "kernel": _orthogonal(key, attention[name]["kernel"], scale)}
            for name, (key, scale) in kernels.items()
        },
    }
    context, width = params["context_positions"].shape
    target = _targets(len(params["query"]), context, width)
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


def _centers(count: int, length: float) -> np.ndarray:
    """The centers of equal spans of `length` positions. Example: 2 of 4 → 0.5, 2.5."""
    return (np.arange(count) + 0.5) / count * length - 0.5


def _targets(num_queries: int, context: int, width: int) -> np.ndarray:
    """Position embeddings at the centers of equal spans: [num_queries, width], deviation 1."""
    positions = sinusoids(context, width)
    positions -= positions.mean(axis=0)  # a component common to all keys has no effect
    centers = np.maximum(_centers(num_queries, context), 0)
    below = centers.astype(int)
    above = np.minimum(below + 1, context - 1)
    fraction = (centers - below)[:, None]
    target = (1 - fraction) * positions[below] + fraction * positions[above]
    return target / target.std(axis=1, keepdims=True)


def _clock(times: np.ndarray, width: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Position embeddings at any times: [times, width], and the frequency of every column.

    The frequencies are Whisper's. Every head has its share of high and of low ones, and of each
    the sine and the cosine.
    """
    of_heads = frequencies(width).reshape(-1, width // head_dim).T  # [heads, head_dim / 2]
    angles = times[:, None, None] * of_heads
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return table.reshape(len(times), width), np.tile(of_heads, 2).reshape(-1)


def _compressor(
    leaves: Mapping,
    times: tuple[np.ndarray, np.ndarray],
    gain: float,
    smoothing: float,
    head_dim: int,
    key: jax.Array,
) -> dict:
    """Queries that match the keys of their time.

    Args:
        times: of the queries and of the context.
        smoothing: in positions; weakens the frequencies that change faster, so that attention
            covers the neighborhood of a query's time.
    """
    width = leaves["query"].shape[1]
    query_positions, of_columns = _clock(times[0], width, head_dim)
    context_positions, _ = _clock(times[1], width, head_dim)
    # The module normalizes the query, so that only its direction counts.
    query = query_positions - context_positions.mean(axis=0)  # common to all keys: has no effect
    scale = gain * np.exp(-((of_columns * smoothing) ** 2) / 2)
    out = leaves["out"]
    identity = {  # of the optional projections
        name: {**part, "kernel": jnp.eye(width, dtype=part["kernel"].dtype)}
        for name, part in leaves.items()
        if name.endswith("_projection")
    }
    values = {
        "query": query,
        "query_positions": query_positions,
        "context_positions": context_positions,
    }
    return {
        **leaves,
        **identity,
        **{name: jnp.asarray(value, leaves[name].dtype) for name, value in values.items()},
        "query_norm": {
            **leaves["query_norm"],
            "scale": jnp.asarray(scale, leaves["query_norm"]["scale"].dtype),
        },
        "context_norm": _with_scale(leaves["context_norm"], LEVEL_CONTENT),
        "out": {**out, "kernel": _orthogonal(key, out["kernel"], 1 / LEVEL_CONTENT)},
    }


def _with_scale(norm: Mapping, scale: float) -> dict:
    return {**norm, "scale": jnp.full_like(norm["scale"], scale)}


def _branch(attention: Mapping, scale: float) -> dict:
    return {**attention, "out": _scaled(attention["out"], scale)}


def _scaled(out: Mapping, scale: float) -> dict:
    return {**out, "kernel": scale * out["kernel"]}


def _orthogonal(key: jax.Array, kernel: jax.Array, scale: float) -> jax.Array:
    return jax.nn.initializers.orthogonal(scale)(key, kernel.shape, kernel.dtype)
