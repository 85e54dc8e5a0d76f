"""The compiled programs of generation. Their shapes do not depend on a recording's length, only on the cache's size.

Shapes: m windows of a micro-batch, b rows of the cache, r of them in a prefill, t tokens of a chunk, d width, v vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastslm_jax import sharding
from fastslm_jax.inference import repetition, sampling
from fastslm_jax.models import log_mel
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.kv_cache import KVCache

STEPS = 64  # tokens of a row in one call of `decode`, at most


class DecodeState(struct.PyTreeNode):
    """Where each row of a running batch stands; arrays [b], on the host between calls.

    token goes to slot `position` next; count new tokens came so far, of `budget`; stream numbers the row's random draws;
    recent and repeated: see `loops`.
    """

    token: jax.Array
    position: jax.Array
    count: jax.Array
    budget: jax.Array
    stream: jax.Array
    done: jax.Array
    looped: jax.Array
    recent: jax.Array
    repeated: jax.Array

    @classmethod
    def idle(cls, rows: int) -> "DecodeState":
        zeros = (np.zeros(rows, np.int32) for _ in range(5))
        return cls(*zeros, np.ones(rows, bool), np.zeros(rows, bool), *repetition.start(rows))

    def begin(self, row: int, token: int, position: int, budget: int, stream: int) -> None:
        """A row starts with a new request: its prompt's last token is fed first."""
        for name, value in (
            ("token", token),
            ("position", position),
            ("budget", budget),
            ("stream", stream),
            ("count", 0),
        ):
            getattr(self, name)[row] = value
        self.done[row] = self.looped[row] = False
        recent, repeated = repetition.start(1)
        self.recent[row], self.repeated[row] = recent[0], repeated[0]


def shards(mesh: Mesh | None) -> int:
    """Devices that rows are spread over."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def _constrain(tree, mesh: Mesh | None, *spec):
    if mesh is None or mesh.size == 1:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec))),
        tree,
    )


def _constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """DecodeState over data × fsdp and heads over tensor, where they divide."""
    if mesh is None or mesh.size == 1:
        return cache
    _, rows, heads = cache.keys.shape[:3]
    spec = (
        None,
        ("data", "fsdp") if rows % shards(mesh) == 0 else None,
        "tensor" if heads % mesh.shape["tensor"] == 0 else None,
    )
    stores = ("keys", "values", "key_scales", "value_scales")
    return cache.replace(**{name: _constrain(getattr(cache, name), mesh, *spec) for name in stores})


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots", "dtype", "mesh"))
def empty_cache(model: FastSLM, *, rows: int, slots: int, dtype, mesh: Mesh | None) -> KVCache:
    return _constrain_cache(model.llm.init_cache(rows, slots, dtype), mesh)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def window_maxima(
    model: FastSLM, windows: jax.Array, frames: jax.Array, *, mesh: Mesh | None
) -> jax.Array:
    """Windows [m, samples] and their valid frames [m] → each one's highest log-mel power [m]."""
    windows = _constrain(
        windows, mesh, sharding.ROWS[0] if len(windows) % shards(mesh) == 0 else None
    )
    with sharding.activations_on(mesh):
        maxima = log_mel.window_maxima(windows[None], frames[None], model.encoder.num_mels)[0]
    return _constrain(maxima, mesh)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def encode(
    model: FastSLM, params: dict, windows: jax.Array, frames: jax.Array, recording: jax.Array, elsewhere: jax.Array,
    *, mesh: Mesh | None,
) -> jax.Array:  # fmt: skip
    """Windows [m, samples], their valid frames, recording and its maximum elsewhere [m] → speech tokens [m, tokens, d]."""
    windows = _constrain(
        windows, mesh, sharding.ROWS[0] if len(windows) % shards(mesh) == 0 else None
    )
    with sharding.activations_on(mesh):
        mel = log_mel.log_mel(
            windows[None], frames[None], recording[None], model.encoder.num_mels, elsewhere[None]
        )
    tokens = model.speech_tokens_from_mel(params, mel)
    return _constrain(tokens.reshape(len(windows), model.tokens_per_window, -1), mesh)


@functools.partial(jax.jit, static_argnames=("model", "mesh"), donate_argnames=("cache",))
def prefill(
    model: FastSLM, params: dict, cache: KVCache, rows: jax.Array, start: jax.Array, tokens: jax.Array,
    speech: jax.Array | None, is_speech: jax.Array | None, *, mesh: Mesh | None,
) -> KVCache:  # fmt: skip
    """Writes a chunk of prompts into rows of the cache.

    Args:
        rows: [r]; start: [r], the slot of each row's first token here.
        tokens: [r, t]. Slots behind a prompt's end may get anything: each is written anew before it is seen.
        speech: [r, t, d], what stands where is_speech [r, t]; None without audio.
    """
    variables = {"params": params["llm"]}
    embeddings = model.llm.apply(variables, tokens, method="embed")
    if speech is not None:
        embeddings = jnp.where(is_speech[:, :, None], speech.astype(embeddings.dtype), embeddings)
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    _, cache = model.llm.apply(variables, embeddings, positions, cache=cache.replace(rows=rows))
    return _constrain_cache(cache.replace(rows=None), mesh)


@functools.partial(jax.jit, static_argnames=("model", "greedy", "mesh"), donate_argnames=("cache",))
def decode(
    model: FastSLM, params: dict, cache: KVCache, rows: DecodeState, seen: jax.Array | None, controls: sampling.Controls,
    end_id: int, max_steps: int, enough: int, detect_repetition: bool, *, greedy: bool, mesh: Mesh | None,
) -> tuple[KVCache, DecodeState, jax.Array]:  # fmt: skip
    """Decodes until all rows are done, `enough` of them are, or max_steps (≤ STEPS) tokens were made.

    Args:
        seen: [b, v], tokens that the repetition penalty acts on; None: no penalty.
        end_id: the token that ends an answer.

    Returns:
        the cache, the rows, and their new tokens [b, STEPS]: those of a row are the first, as many as its count grew by.
    """
    variables, batch = {"params": params["llm"]}, rows.token.shape[0]

    def body(carry):
        step, cache, rows, seen, out = carry
        embedding = model.llm.apply(variables, rows.token[:, None], method="embed")
        position = jnp.where(
            rows.done, 0, rows.position
        )  # an idle row may not lengthen what attention reads
        hidden, cache = model.llm.apply(variables, embedding, position[:, None], cache=cache)
        logits = model.logits(params, hidden[:, 0])
        token = sampling.choose(logits, seen, controls, rows.stream, rows.count, greedy=greedy)
        token, running = jnp.where(rows.done, 0, token), ~rows.done
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        if seen is not None:
            seen = seen | (jax.nn.one_hot(token, seen.shape[1], dtype=bool) & running[:, None])
        recent, repeated, looped = repetition.advance(rows.recent, rows.repeated, token)
        ended, count = token == end_id, rows.count + running
        looped = looped & running & ~ended & detect_repetition
        rows = rows.replace(
            token=token, position=rows.position + running, count=count, recent=recent, repeated=repeated,
            done=rows.done | ended | looped | (count >= rows.budget), looped=rows.looped | looped,
        )  # fmt: skip
        return step + 1, cache, rows, seen, out

    def goes_on(carry):
        done = jnp.sum(carry[2].done)
        return (carry[0] < jnp.minimum(max_steps, STEPS)) & (done < jnp.minimum(batch, enough))

    cache = cache.replace(layer=jnp.int32(model.llm.num_layers))
    rows = jax.tree.map(jnp.asarray, rows)
    start = (jnp.int32(0), cache, rows, seen, jnp.zeros((batch, STEPS), jnp.int32))
    _, cache, rows, _, out = jax.lax.while_loop(goes_on, body, start)
    return _constrain_cache(cache, mesh), _constrain(rows, mesh), _constrain(out, mesh)
