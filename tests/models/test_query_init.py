"""The start in time: where each speech token listens before anything was learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fastslm_jax.models.hfq_former import HFQFormer
from fastslm_jax.models.query_init import temporal_query_init

FRAMES, TOKENS = 300, 10


@pytest.fixture(scope="module")
def module():
    return HFQFormer(192, stage_tokens=(16, 16, 16), compression_size=TOKENS)


@pytest.fixture(scope="module")
def normal(module):
    return module.init(jax.random.key(0), jnp.zeros((1, FRAMES, 128)))["params"]


def heard(module, params):
    """|change of token i| where the frames of span j change: [tokens, spans]."""
    features = jax.random.normal(jax.random.key(1), (1, FRAMES, 128))
    other = jax.random.normal(jax.random.key(2), (1, FRAMES, 128))
    span = jnp.arange(FRAMES) * TOKENS // FRAMES
    changed = jnp.where((span == jnp.arange(TOKENS)[:, None])[:, :, None], other, features)
    tokens = module.apply({"params": params}, jnp.concatenate([features, changed]))
    return np.asarray(jnp.linalg.norm(tokens[1:] - tokens[0], axis=-1)).T


def test_a_token_listens_to_its_own_span_most(module, normal):
    change = heard(module, temporal_query_init(normal, jax.random.key(3)))
    nearest = change.argmax(axis=1)
    assert np.abs(nearest - np.arange(TOKENS)).max() <= 1
    assert (np.diff(nearest) >= 0).all()  # tokens keep the order of time


def test_the_normal_start_listens_everywhere_alike(module, normal):
    """What the start in time is for: there the own span is worth no more than another."""
    share = {name: np.mean(np.diag(c) / c.sum(axis=1)) for name, c in (
        ("normal", heard(module, normal)), ("time", heard(module, temporal_query_init(normal, jax.random.key(3)))),
    )}  # fmt: skip
    assert share["normal"] == pytest.approx(1 / TOKENS, abs=0.03)
    assert share["time"] > 0.25


def test_only_values_differ_from_the_normal_start(normal):
    started = flatten_dict(temporal_query_init(normal, jax.random.key(3)), sep="/")
    before = flatten_dict(normal, sep="/")
    assert {path: leaf.shape for path, leaf in started.items()} == {
        path: leaf.shape for path, leaf in before.items()
    }
    changed = {path for path in before if not np.array_equal(before[path], started[path])}
    compressors = ("compressor_1", "compressor_2", "compressor_3", "semantic_distillation")
    expected = {
        f"{name}/{leaf}"
        for name in compressors
        for leaf in ("query", "query_norm/scale", "context_norm/scale", "out/kernel")
    }
    expected |= {
        f"detail_recovery_{i}/{kind}_attention/out/kernel"
        for i in range(2)
        for kind in ("self", "cross")
    }
    assert changed == expected | {"projection/kernel"}


def test_tokens_start_at_the_size_of_embeddings(module, normal):
    features = jax.random.normal(jax.random.key(1), (4, FRAMES, 128))
    tokens = module.apply({"params": temporal_query_init(normal, jax.random.key(3))}, features)
    assert 0.02 < float(jnp.sqrt(jnp.mean(tokens**2))) < 0.2
