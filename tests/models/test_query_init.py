"""Temporal query initialization: which frames each speech token attends to before training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax.models.adapters import HFQFormer, Pooling, SQFormer, Stack, WQFormer

FRAMES, TOKENS = 300, 10


HFQ_FORMER = HFQFormer(192, TOKENS, stage_tokens=(16, 16, 16))


@pytest.fixture(scope="module", params=[HFQ_FORMER, SQFormer(192, TOKENS)], ids=["hfq", "sq"])
def module(request):
    return request.param


@pytest.fixture(scope="module")
def normal(module):
    return normal_params(module)


def normal_params(module):
    return jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, FRAMES, 128)))["params"]


def sensitivity(module, params):
    """Change of token i when the frames of span j are replaced: [tokens, spans]."""
    features = jax.random.normal(jax.random.key(1), (1, FRAMES, 128))
    other = jax.random.normal(jax.random.key(2), (1, FRAMES, 128))
    span = jnp.arange(FRAMES) * TOKENS // FRAMES
    changed = jnp.where((span == jnp.arange(TOKENS)[:, None])[:, :, None], other, features)
    tokens = module.apply({"params": params}, jnp.concatenate([features, changed]))
    return np.asarray(jnp.linalg.norm(tokens[1:] - tokens[0], axis=-1)).T


def test_tokens_attend_mostly_to_their_own_span(module, normal):
    change = sensitivity(module, module.temporal_init(normal, jax.random.key(3)))
    nearest = change.argmax(axis=1)
    assert np.abs(nearest - np.arange(TOKENS)).max() <= 1
    assert (np.diff(nearest) >= 0).all()  # tokens are in temporal order


def test_normal_initialization_attends_uniformly(module, normal):
    """The motivation: with normal initialization a token's own span counts as much as others."""

    def own_share(params):
        change = sensitivity(module, params)
        return np.mean(np.diag(change) / change.sum(axis=1))

    assert own_share(normal) == pytest.approx(1 / TOKENS, abs=0.03)
    assert own_share(module.temporal_init(normal, jax.random.key(3))) > 0.25


@pytest.mark.parametrize(
    ("width", "frames", "tokens", "stage_tokens"),
    [(128, 300, 10, (16, 16, 16)), (512, 300, 30, (60, 60, 30)), (1280, 1500, 50, (80, 80, 80))],
    ids=["demo", "Whisper base, 6 s", "Whisper large-v3, 30 s"],
)
def test_every_head_reads_its_span(width, frames, tokens, stage_tokens):
    """Also in wide models, whose later heads have low frequencies only in Whisper's table."""
    module = HFQFormer(192, tokens, stage_tokens=stage_tokens)
    features = jnp.zeros((1, frames, width))  # attention by position alone

    @jax.jit
    def attention():
        params = module.init(jax.random.key(0), features)["params"]
        params = module.temporal_init(params, jax.random.key(3))
        return module.apply({"params": params}, features, mutable=["attention"])[1]["attention"]

    sown = attention()
    for level, count in enumerate(stage_tokens, start=1):
        spans = [spans_of(count, frames // 2 ** (level - 1))]
        share = own_share(sown[f"compressor_{level}"], spans, count)
        assert share.min() > 0.9
    spans = [spans_of(tokens, count) for count in stage_tokens]
    share = own_share(sown["semantic_distillation"], spans, tokens)
    assert share.min() > 0.9


def spans_of(count, length):
    """The span, out of `count`, of each of `length` positions."""
    return (np.arange(length) + 0.5) * count // length


def own_share(sown, spans, count):
    """Attention of each head to the queries' own spans and their neighbors: [heads].

    Uniform attention would give 3 / count.
    """
    query, key = sown["query_key"][0]
    logits = jnp.einsum("bqhd,bkhd->hqk", query, key) / np.sqrt(query.shape[-1])
    distance = np.concatenate(spans) - np.arange(count)[:, None]
    is_near = np.abs(distance) <= 1
    return np.asarray(jnp.mean(jnp.sum(jax.nn.softmax(logits) * is_near, axis=-1), axis=-1))


def changed_values(module):
    normal = normal_params(module)
    after = flatten_dict(module.temporal_init(normal, jax.random.key(3)), sep="/")
    before = flatten_dict(normal, sep="/")
    assert {path: leaf.shape for path, leaf in after.items()} == {
        path: leaf.shape for path, leaf in before.items()
    }
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_only_the_documented_values_of_the_hfq_former_change():
    changed = changed_values(HFQ_FORMER)
    compressors = ("compressor_1", "compressor_2", "compressor_3", "semantic_distillation")
    expected = {
        f"{name}/{leaf}"
        for name in compressors
        for leaf in (
            "query",
            "query_positions",
            "context_positions",
            "query_norm/scale",
            "context_norm/scale",
            "out/kernel",
        )
    }
    expected |= {
        f"detail_recovery_{i}/{kind}_attention/out/kernel"
        for i in range(2)
        for kind in ("self", "cross")
    }
    assert changed == expected | {"projection/kernel"}


def test_of_other_adapters_only_the_scale_of_tokens_changes():
    assert changed_values(Pooling(192, TOKENS)) == {"projection/kernel"}


@pytest.mark.parametrize("kind", [HFQFormer, Pooling, Stack, WQFormer, SQFormer])
def test_tokens_have_the_scale_of_embeddings(kind):
    module = kind(192, TOKENS)
    features = jax.random.normal(jax.random.key(1), (4, FRAMES // 6, 128))
    features = jnp.repeat(features, 6, axis=1)  # neighbors are similar, as in speech
    params = module.temporal_init(normal_params(module), jax.random.key(3))
    tokens = module.apply({"params": params}, features)
    assert 0.02 < float(jnp.sqrt(jnp.mean(tokens**2))) < 0.2


def test_projections_of_the_compressors_start_as_the_identity():
    """So that temporal initialization gives the same tokens with them as without."""
    features = jax.random.normal(jax.random.key(1), (1, FRAMES, 128))
    module = HFQ_FORMER.clone(compressor_projections=True)
    params = module.temporal_init(normal_params(module), jax.random.key(3))
    leaves = flatten_dict(params).items()
    kept = {path: leaf for path, leaf in leaves if not path[-2].endswith("_projection")}
    with_projections = module.apply({"params": params}, features)
    without = HFQ_FORMER.apply({"params": unflatten_dict(kept)}, features)
    np.testing.assert_allclose(with_projections, without, atol=1e-5)
