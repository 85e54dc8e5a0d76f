"""Key-value cache: in-place writes without a serial loop, and attention over cached tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastslm_jax import sharding
from fastslm_jax.models.kv_cache import (
    KVCache,
    scatter_rows,
    summed_scores,
    summed_values,
    update_rows,
)

LAYERS, ROWS, HEADS, LENGTH, HEAD_DIM = 3, 4, 2, 12, 8
POSITIONS = jnp.broadcast_to(jnp.arange(9), (2, 9))


@pytest.fixture(scope="module")
def forward(model, params):
    """forward(embeddings, position_ids, segment_ids, lora_gate, cache) → (hidden, cache)."""
    return jax.jit(lambda *args: model.llm.apply({"params": params["llm"]}, *args))


@pytest.fixture(scope="module")
def embeddings():
    return jax.random.normal(jax.random.key(0), (2, 9, 32))


@pytest.mark.parametrize("chunks", [(9,), (4, 5), (5, 1, 1, 1, 1)])
def test_chunked_prefill_and_decoding_match_the_full_forward_pass(
    model, forward, embeddings, chunks
):
    whole, _ = forward(embeddings, POSITIONS)
    cache, parts, first = model.llm.init_cache(batch=2, cache_length=12), [], 0
    for length in chunks:
        chunk = slice(first, first + length)
        hidden, cache = forward(embeddings[:, chunk], POSITIONS[:, chunk], None, None, cache)
        parts.append(hidden)
        first += length
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    assert not np.asarray(cache.keys)[:, :, :, 9:].any()  # unused positions


def test_rows_advance_independently(model, forward, embeddings):
    """Row 0 has 5 tokens and row 1 has 3; its padding is overwritten by its next token."""
    whole, _ = forward(embeddings, POSITIONS)
    _, cache = forward(embeddings[:, :5], POSITIONS[:, :5], None, None, model.llm.init_cache(2, 12))
    step = jnp.stack([embeddings[0, 5], embeddings[1, 3]])[:, None]
    hidden, _ = forward(step, jnp.array([[5], [3]]), None, None, cache)
    np.testing.assert_allclose(hidden[:, 0], [whole[0, 5], whole[1, 3]], atol=1e-5)


@pytest.mark.parametrize("is_scale", [False, True], ids=["values", "scales"])
@pytest.mark.parametrize("rows", [None, (2, 0)], ids=["all rows", "selected rows"])
@pytest.mark.parametrize("write", [scatter_rows, update_rows])
def test_writes_change_only_the_new_positions(write, rows, is_scale):
    tail = () if is_scale else (HEAD_DIM,)
    store = jax.random.normal(jax.random.key(0), (LAYERS, ROWS, HEADS, LENGTH, *tail))
    start = np.array([0, 5, 9, 2] if rows is None else [7, 3])
    new = jax.random.normal(jax.random.key(1), (len(start), HEADS, 3, *tail))
    expected = np.array(store)
    for i, row in enumerate(range(ROWS) if rows is None else rows):
        expected[1, row, :, start[i] : start[i] + 3] = new[i]
    rows = None if rows is None else jnp.array(rows)
    written = jax.jit(write)(store, new, jnp.array(start), layer=jnp.int32(1), rows=rows)
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("rows", [None, (2, 0)], ids=["all rows", "selected rows"])
@pytest.mark.parametrize(
    ("platform", "scatters", "slice_updates_per_row"), [("cuda", 2, 0), ("tpu", 0, 2)]
)
def test_accelerators_write_without_a_loop_over_rows(
    platform, scatters, slice_updates_per_row, rows
):
    """Keys and values take one scatter each on a GPU, and one in-place update per row on a TPU."""
    count = ROWS if rows is None else len(rows)
    rows = None if rows is None else jnp.array(rows)
    cache = KVCache.empty(LAYERS, ROWS, HEADS, LENGTH, HEAD_DIM, jnp.bfloat16).replace(rows=rows)
    new = jnp.zeros((count, 1, HEADS, HEAD_DIM), jnp.bfloat16)
    traced = jax.jit(KVCache.attend).trace(cache, new, new, new, jnp.zeros((count, 1), jnp.int32))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.while") == 0
    assert program.count('"stablehlo.scatter"(') == scatters
    assert program.count("stablehlo.dynamic_update_slice") == slice_updates_per_row * count


def test_cache_length_is_a_multiple_of_the_attention_block():
    with pytest.raises(ValueError, match=r"cache length 300 must be a multiple .* of 37 positions"):
        KVCache.empty(LAYERS, ROWS, HEADS, 300, HEAD_DIM, jnp.float32)


def test_sharded_rows_are_written_without_communication():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    cache_sharding = NamedSharding(mesh, P(None, ("data", "fsdp")))
    cache = KVCache.empty(LAYERS, 8, HEADS, LENGTH, HEAD_DIM, jnp.float32)
    cache = cache.replace(
        keys=jax.device_put(cache.keys, cache_sharding),
        values=jax.device_put(cache.values, cache_sharding),
        is_sharded=True,
    )
    new = jax.device_put(jnp.zeros((8, 1, HEADS, HEAD_DIM)), NamedSharding(mesh, sharding.ROWS))
    positions = jax.device_put(jnp.zeros((8, 1), jnp.int32), NamedSharding(mesh, sharding.ROWS))
    program = jax.jit(KVCache.attend).lower(cache, new, new, new, positions).compile().as_text()
    for collective in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert collective not in program


@pytest.mark.parametrize(
    ("summed", "equation", "shapes"),
    [
        (summed_scores, "rkqh,rksh->rkqs", ((3, 2, 4, 8), (3, 2, 5, 8))),
        (summed_values, "rkqs,rksh->rkqh", ((3, 2, 4, 5), (3, 2, 5, 8))),
    ],
)
def test_sums_equal_matrix_products(summed, equation, shapes):
    """What a GPU computes in decoding."""
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    expected = np.einsum(equation, left, right)
    np.testing.assert_allclose(jax.jit(summed)(left, right), expected, rtol=1e-5, atol=1e-5)
