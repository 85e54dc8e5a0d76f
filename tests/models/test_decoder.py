"""Decoder: scanned layers, rotary positions, causal and packed attention, and logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax.models.attention import CausalSegments
from fastslm_jax.models.decoder import DecoderBlock, RMSNorm, RoPE


@pytest.fixture(scope="module")
def forward(model, params):
    """forward(embeddings, position_ids, segment_ids, lora_gate, cache) → (hidden, cache)."""
    return jax.jit(lambda *args: model.llm.apply({"params": params["llm"]}, *args))


@pytest.fixture(scope="module")
def embeddings():
    return jax.random.normal(jax.random.key(0), (2, 9, 32))


POSITIONS = jnp.broadcast_to(jnp.arange(9), (2, 9))


def test_scanned_layers_match_a_plain_loop(model, params, forward, embeddings):
    llm, weights = model.llm, params["llm"]

    @jax.jit
    def unrolled(weights, x):
        block = DecoderBlock(
            llm.num_heads,
            llm.num_kv_heads,
            llm.head_dim,
            llm.mlp_dim,
            llm.rope,
            llm.epsilon,
            llm.lora,
            deterministic=True,
        )
        mask = CausalSegments()
        for layer in range(llm.num_layers):
            layer_params = jax.tree.map(lambda leaf, i=layer: leaf[i], weights["layers"])
            (x, _), _ = block.apply({"params": layer_params}, (x, None), POSITIONS, mask, None)
        return RMSNorm(llm.epsilon).apply({"params": weights["final_norm"]}, x)

    hidden, cache = forward(embeddings, POSITIONS)
    assert cache is None
    np.testing.assert_allclose(hidden, unrolled(weights, embeddings), atol=1e-5)


def test_unrolled_layers_are_rematerialized(model, params, embeddings):
    """Common-subexpression elimination must not undo the rematerialization."""

    def products(remat: str) -> int:
        llm = model.llm.clone(remat=remat, scan_layers=False)

        def loss(weights):
            return jnp.sum(llm.apply({"params": weights}, embeddings, POSITIONS)[0])

        return jax.jit(jax.grad(loss)).lower(params["llm"]).compile().as_text().count(" dot(")

    assert products("full") > products("none") > 0


def test_rms_norm_values():
    params = {"scale": jnp.array([1.0, 2.0])}
    normalized = RMSNorm(epsilon=0.0).apply({"params": params}, jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(normalized, [3 / np.sqrt(12.5), 8 / np.sqrt(12.5)], rtol=1e-6)


def test_rope_rotates_pairs_across_the_two_halves():
    x = jnp.array([1.0, 10.0, 0.0, 0.0]).reshape(1, 1, 1, 4)  # pairs (0, 2) and (1, 3)
    rotated = RoPE(theta=100.0)(x, jnp.array([[3]]))[0, 0, 0]  # frequencies 1 and 100^(-1/2)
    np.testing.assert_allclose(
        rotated, [np.cos(3), 10 * np.cos(0.3), np.sin(3), 10 * np.sin(0.3)], rtol=1e-5
    )


def test_yarn_keeps_fast_rotations_and_slows_slow_ones():
    rope = RoPE(theta=1e6, factor=4.0, original_max_positions=32_768, kind="yarn")
    plain, scale = RoPE(theta=1e6).inverse_frequencies(128)
    assert scale == 1.0
    slowed, scale = rope.inverse_frequencies(128)
    assert scale == pytest.approx(0.1 * np.log(4) + 1)
    np.testing.assert_array_equal(slowed[:10], plain[:10])
    np.testing.assert_allclose(slowed[-10:], plain[-10:] / 4, rtol=1e-6)
    assert (np.diff(slowed / plain) <= 1e-6).all()


def test_attention_is_causal(forward, embeddings):
    hidden, _ = forward(embeddings, POSITIONS)
    changed, _ = forward(embeddings.at[:, 6].add(1.0), POSITIONS)
    np.testing.assert_array_equal(hidden[:, :6], changed[:, :6])
    assert (np.abs(hidden[:, 6:] - changed[:, 6:]).max(axis=-1) > 1e-4).all()


def test_packed_segments_do_not_attend_to_each_other(forward, embeddings):
    first, second = embeddings[:, :4], embeddings[:, 4:]
    positions = jnp.concatenate([POSITIONS[:, :4], POSITIONS[:, :5]], axis=1)
    segments = jnp.broadcast_to(jnp.array([1, 1, 1, 1, 2, 2, 2, 2, 2]), (2, 9))
    packed, _ = forward(embeddings, positions, segments)
    np.testing.assert_allclose(packed[:, :4], forward(first, POSITIONS[:, :4])[0], atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:], forward(second, POSITIONS[:, :5])[0], atol=1e-5)


def test_logits_use_tied_embeddings_or_an_untied_head(model, params):
    hidden = jax.random.normal(jax.random.key(1), (2, 32))
    table = params["llm"]["embed_tokens"]
    tied = model.llm.apply({"params": params["llm"]}, hidden, method="logits")
    np.testing.assert_allclose(tied, hidden @ table.T, atol=1e-5)
    untied = model.llm.clone(tied_embeddings=False)
    with_head = params["llm"] | {"lm_head": 2 * table}
    np.testing.assert_allclose(
        untied.apply({"params": with_head}, hidden, method="logits"), 2 * tied, atol=1e-5
    )
