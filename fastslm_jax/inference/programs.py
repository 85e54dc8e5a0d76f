"""The compiled programs of generation: encode, prefill, decode.

Their shapes depend on the cache length, never on the length of a recording.

Shapes: m windows of a micro-batch, b rows of the cache, r rows of a prefill, t tokens of a chunk,
d width, v vocabulary.
"""

import functools
from typing import TypeVar

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

T = TypeVar("T")
DECODE_STEPS = 64  # maximum tokens per row in one call of `decode`


class DecodeState(struct.PyTreeNode):
    """The state of each row of a batch; arrays [b], on the host between calls.

    Attributes:
        token: the next input token, which is written to cache position `position`.
        count: new tokens so far, of `budget`.
        stream: number of the row's random stream (see `sampling.choose`).
        recent, repeated: see `repetition`.
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

    def start(self, row: int, token: int, position: int, budget: int, stream: int) -> None:
        """Resets a row for a new request whose last prompt token is `token`."""
        self.token[row], self.position[row], self.count[row] = token, position, 0
        self.budget[row], self.stream[row] = budget, stream
        self.done[row] = self.looped[row] = False
        recent, repeated = repetition.start(1)
        self.recent[row], self.repeated[row] = recent[0], repeated[0]


Carry = tuple[jax.Array, KVCache, DecodeState, jax.Array | None, jax.Array]  # of the decode loop


def row_shards(mesh: Mesh | None) -> int:
    """Number of devices that rows are sharded over."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def _constrain(tree: T, mesh: Mesh | None, *spec: str | tuple[str, ...] | None) -> T:
    """Constrains the sharding of every leaf; without a spec, to replicated."""
    if mesh is None or mesh.size == 1:
        return tree
    placed = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, placed), tree)


def _shard_windows(windows: jax.Array, mesh: Mesh | None) -> jax.Array:
    return _constrain(
        windows, mesh, *(sharding.ROWS if len(windows) % row_shards(mesh) == 0 else ())
    )


def _constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Rows over data × fsdp and heads over tensor, where they divide."""
    if mesh is None or mesh.size == 1:
        return cache
    _, rows, heads = cache.keys.shape[:3]
    spec = (
        None,
        ("data", "fsdp") if rows % row_shards(mesh) == 0 else None,
        "tensor" if heads % mesh.shape["tensor"] == 0 else None,
    )
    stores = ("keys", "values", "key_scales", "value_scales")
    return cache.replace(**{name: _constrain(getattr(cache, name), mesh, *spec) for name in stores})


@functools.partial(jax.jit, static_argnames=("model", "rows", "cache_length", "dtype", "mesh"))
def empty_cache(
    model: FastSLM, *, rows: int, cache_length: int, dtype: jnp.dtype, mesh: Mesh | None
) -> KVCache:
    """A key-value cache of `cache_length` positions per row."""
    cache = model.llm.init_cache(rows, cache_length, dtype)
    is_sharded = mesh is not None and mesh.size > 1
    return _constrain_cache(cache.replace(is_sharded=is_sharded), mesh)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def window_maxima(
    model: FastSLM, windows: jax.Array, frames: jax.Array, *, mesh: Mesh | None
) -> jax.Array:
    """Windows [m, samples] and valid frames [m] → maximum log-mel powers [m]."""
    windows = _shard_windows(windows, mesh)
    with sharding.activations_on(mesh):
        maxima = log_mel.window_maxima(windows[None], frames[None], model.encoder.num_mels)[0]
    return _constrain(maxima, mesh)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def encode(
    model: FastSLM,
    params: dict,
    windows: jax.Array,
    frames: jax.Array,
    recording: jax.Array,
    elsewhere: jax.Array,
    *,
    mesh: Mesh | None,
) -> jax.Array:
    """Windows [m, samples] → speech tokens [m, tokens_per_window, d].

    See `log_mel.log_mel` for the arguments.
    """
    windows = _shard_windows(windows, mesh)
    with sharding.activations_on(mesh):
        mel = log_mel.log_mel(
            windows[None], frames[None], recording[None], model.encoder.num_mels, elsewhere[None]
        )
    tokens = model.speech_tokens_from_mel(params, mel)
    return _constrain(tokens.reshape(len(windows), model.tokens_per_window, -1), mesh)


@functools.partial(jax.jit, static_argnames=("model", "mesh"), donate_argnames=("cache",))
def prefill(
    model: FastSLM,
    params: dict,
    cache: KVCache,
    rows: jax.Array,
    start: jax.Array,
    tokens: jax.Array,
    speech: jax.Array | None,
    is_speech: jax.Array | None,
    *,
    mesh: Mesh | None,
) -> KVCache:
    """Writes a chunk of prompts into the cache.

    Args:
        rows: [r], the rows of the cache.
        start: [r], the position of each row's first token of this chunk.
        tokens: [r, t]. Tokens beyond a prompt's end may be anything: their positions are
            overwritten before attention reads them.
        speech: [r, t, d], replaces embeddings where is_speech [r, t]; None without audio.
    """
    variables = {"params": _stacked(params["llm"])}
    embeddings = model.llm.apply(variables, tokens, method="embed")
    if speech is not None:
        embeddings = jnp.where(is_speech[:, :, None], speech.astype(embeddings.dtype), embeddings)
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    _, cache = model.llm.apply(variables, embeddings, positions, cache=cache.replace(rows=rows))
    return _constrain_cache(cache.replace(rows=None), mesh)


def separate_layers(params: dict) -> dict:
    """Parameters with one dict per layer of the decoder, for a model with scan_layers=False.

    For GPUs: XLA would copy the weights of each layer out of the stack for every token, because
    matrix products there read whole arrays. Once separate, they are read where they are.
    """
    layers = params["llm"]["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    by_name = {str(number): layer for number, layer in enumerate(_layers_of(layers, count))}
    return {**params, "llm": {**params["llm"], "layers": by_name}}


def _layers_of(layers: dict, num_layers: int) -> list[dict]:
    """The weights of each layer, sliced before the decode loop: inside it, XLA would copy them."""
    if "0" in layers:
        return [layers[str(i)] for i in range(num_layers)]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(num_layers)]


def _stacked(llm: dict, layers: list[dict] | None = None) -> dict:
    """Parameters with stacked layers; XLA reduces the slices of an unrolled stack to its parts."""
    if layers is None and "0" in llm["layers"]:
        layers = _layers_of(llm["layers"], len(llm["layers"]))
    if layers is None:
        return llm
    return {**llm, "layers": jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}


@functools.partial(jax.jit, static_argnames=("model", "greedy", "mesh"), donate_argnames=("cache",))
def decode(
    model: FastSLM,
    params: dict,
    cache: KVCache,
    state: DecodeState,
    seen: jax.Array | None,
    controls: sampling.Controls,
    end_ids: jax.Array,
    max_steps: int,
    enough: int,
    detect_repetition: bool,
    *,
    greedy: bool,
    mesh: Mesh | None,
) -> tuple[KVCache, DecodeState, jax.Array]:
    """Decodes until `enough` rows (or all) are done, or max_steps (≤ DECODE_STEPS) have run.

    Args:
        seen: [b, v], tokens that the repetition penalty acts on; None: no penalty.
        end_ids: [e], the tokens that end an answer.

    Returns:
        The cache, the state, and the new tokens [b, DECODE_STEPS], of which the first ones of a row
        are valid, as many as its count grew by.
    """
    batch = state.token.shape[0]
    layers = _layers_of(params["llm"]["layers"], model.llm.num_layers)

    def body(carry: Carry) -> Carry:
        step, cache, state, seen, out = carry
        variables = {"params": _stacked(params["llm"], None if model.llm.scan_layers else layers)}
        embedding = model.llm.apply(variables, state.token[:, None], method="embed")
        # Idle rows read position 0 only, so that they do not lengthen what attention reads.
        position = jnp.where(state.done, 0, state.position)
        hidden, cache = model.llm.apply(variables, embedding, position[:, None], cache=cache)
        logits = model.logits(params, hidden[:, 0])
        token = sampling.choose(logits, seen, controls, state.stream, state.count, greedy=greedy)
        token, running = jnp.where(state.done, 0, token), ~state.done
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        if seen is not None:
            seen = seen | (jax.nn.one_hot(token, seen.shape[1], dtype=bool) & running[:, None])
        recent, repeated, looped = repetition.advance(state.recent, state.repeated, token)
        ended, count = jnp.isin(token, end_ids), state.count + running
        looped = looped & running & ~ended & detect_repetition
        state = state.replace(
            token=token,
            position=state.position + running,
            count=count,
            recent=recent,
            repeated=repeated,
            done=state.done | ended | looped | (count >= state.budget),
            looped=state.looped | looped,
        )
        return step + 1, cache, state, seen, out

    def is_running(carry: Carry) -> jax.Array:
        done = jnp.sum(carry[2].done)
        return (carry[0] < jnp.minimum(max_steps, DECODE_STEPS)) & (
            done < jnp.minimum(batch, enough)
        )

    cache = cache.replace(layer=jnp.int32(model.llm.num_layers))
    state = jax.tree.map(jnp.asarray, state)
    out = jnp.zeros((batch, DECODE_STEPS), jnp.int32)
    start = (jnp.int32(0), cache, state, seen, out)
    _, cache, state, _, out = jax.lax.while_loop(is_running, body, start)
    return _constrain_cache(cache, mesh), _constrain(state, mesh), _constrain(out, mesh)
