"""What holds for every adapter: shapes, gradients, independent windows, FLOPs, parameter counts."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import config as config_lib
from fastslm_jax import flops
from fastslm_jax.errors import UserError
from fastslm_jax.models.adapters import ADAPTERS, Pooling, SQFormer, Stack, WQFormer
from fastslm_jax.models.adapters.base import MLPAdapter
from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.layers import sinusoids
from fastslm_jax.training import experiment, optim

FRAMES, WIDTH, OUTPUT = 60, 64, 32
VARIANTS = {  # fields of config.model
    **{name: {"adapter": name} for name in ADAPTERS},
    "one scale, no recovery": {"stage_tokens": (6,), "detail_recovery_layers": 0},
    "four scales, two layers": {
        "stage_tokens": (6, 5, 4, 3),
        "detail_recovery_layers": 2,
        "downsample_factor": 3,
        "compressor_projections": True,
        "compression_size": 5,
    },
    "short levels": {"downsample_factor": 5},
    "one narrow layer": {"adapter": "sq_former", "qformer_layers": 1, "adapter_mlp_dim": 24},
    "narrow": {"adapter": "stack", "compression_size": 20, "adapter_mlp_dim": 24},
}


def make(frames=FRAMES, output=OUTPUT, **options):
    """The adapter of config.model with these fields; by default 10 tokens, 1.67 a second."""
    config = config_lib.full_size().model
    config.update({"stage_tokens": (6, 5, 4), "detail_recovery_layers": 1, "compression_size": 10})
    config.update(options)
    return experiment.make_adapter(config, frames, output, AttentionKernel(), jnp.float32)


def shapes(adapter, frames=FRAMES, width=WIDTH):
    features = jax.ShapeDtypeStruct((1, frames, width), jnp.float32)
    init = functools.partial(adapter.init, jax.random.key(0))
    return flatten_dict({adapter.GROUP: jax.eval_shape(init, features)["params"]}, sep="/")


def is_fixed(path):
    return path.endswith("_positions")


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_shape_independent_windows_and_gradients(options):
    """Tokens of a window depend on no other window; gradients reach every trained parameter."""
    adapter, rng = make(**options), np.random.default_rng(0)
    params = {
        path: sinusoids(*leaf.shape)
        if is_fixed(path)
        else np.float32(path.endswith("/scale") + rng.normal(0, 0.2, leaf.shape))
        for path, leaf in shapes(adapter).items()
    }
    features = rng.normal(size=(3, FRAMES, WIDTH)).astype(np.float32)
    target = rng.normal(size=(3, adapter.compression_size, OUTPUT)).astype(np.float32)

    @jax.jit
    def run(params, features):
        def score(params):
            tree = unflatten_dict(params, sep="/")[adapter.GROUP]
            tokens = adapter.apply({"params": tree}, features)
            return jnp.sum(target * tokens), tokens

        return jax.grad(score, has_aux=True)(params)

    gradients, tokens = run(params, features)
    assert tokens.shape == (3, adapter.compression_size, OUTPUT)
    mask = optim.trainable_mask([*params, "encoder/positions"], config_lib.TRAINABLE[:2])
    assert {path for path in params if not mask[path]} == set(filter(is_fixed, params))
    assert [path for path in params if mask[path] and not np.any(gradients[path])] == []

    features[1] += 1 + features[0]
    _, changed = run(params, features)
    np.testing.assert_array_equal(tokens[np.array([0, 2])], changed[np.array([0, 2])])
    assert np.abs(tokens[1] - changed[1]).max() > 1e-3


# ---- FLOPs ----


def attention_scores(adapter):
    """Query-key pairs of a window, in all layers."""
    tokens = adapter.compression_size
    if isinstance(adapter, MLPAdapter):
        return 0
    if isinstance(adapter, WQFormer):  # no self-attention
        return adapter.num_layers * FRAMES
    if isinstance(adapter, SQFormer):
        return adapter.num_layers * tokens * (tokens + FRAMES)
    lengths = [FRAMES]
    for _ in adapter.stage_tokens[1:]:
        lengths.append(-(-lengths[-1] // adapter.downsample_factor))
    levels = sum(map(operator.mul, adapter.stage_tokens, lengths))
    recovery = tokens + sum(lengths)
    return levels + tokens * (sum(adapter.stage_tokens) + adapter.detail_recovery_layers * recovery)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_minimum_and_two_known_extras_are_executed(options):
    """The other extras of a training step are in tests/test_flops.py."""
    adapter, windows = make(**options), 3
    features = jax.ShapeDtypeStruct((windows, FRAMES, WIDTH), jnp.float32)

    def total(params, features):
        return adapter.apply({"params": params}, features).sum()

    params = unflatten_dict(shapes(adapter), sep="/")[adapter.GROUP]
    executed = flops.executed(jax.jit(jax.value_and_grad(total)).trace(params, features))
    # The backward pass of attention recomputes the scores; the key and value projections of the
    # HFQ-Former's detail recovery also compute the input gradient of the encoder's features.
    again = 2 * attention_scores(adapter) * WIDTH
    if adapter.GROUP == "hfq_former":
        again += adapter.detail_recovery_layers * 2 * 2 * FRAMES * WIDTH**2
    minimum = sum(adapter.minimum_flops(FRAMES, WIDTH).values())
    assert executed == windows * (minimum + again)


# ---- sizes ----


@pytest.mark.parametrize(
    ("size", "frames", "width", "output", "parameters"),
    [
        ("demo", 300, 128, 192, 562_624),
        ("full", 1500, 1280, 2560, 56_140_800),
    ],
)
def test_parameters_match_the_hfq_former_within_a_fifth(size, frames, width, output, parameters):
    config = (config_lib.small_size if size == "demo" else config_lib.full_size)().model
    options = {"stage_tokens": config.stage_tokens, "compression_size": config.compression_size}
    for name in ADAPTERS:
        adapter = make(frames, output, adapter=name, detail_recovery_layers=2, **options)
        leaves = shapes(adapter, frames, width)
        count = sum(leaf.size for path, leaf in leaves.items() if not is_fixed(path))
        if name == "hfq":
            assert count == parameters
        assert count == pytest.approx(parameters, rel=0.2), name
        assert adapter.compression_size / (frames / 50) == pytest.approx(1.67, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "stack", "compression_size": 7}, "compression_size=7: .* choose 6 or 10, or"),
        ({"adapter": "pooling", "compression_size": 120}, "compression_size=120: .* choose 60, or"),
        ({"adapter": "wq_former", "compression_size": 8}, ".*the 60 frames of a window into equal"),
        ({"adapter": "sq_former", "qformer_layers": 4}, "qformer_layers=4: their attention has"),
    ],
)
def test_impossible_sizes_are_one_line(options, message):
    with pytest.raises(UserError, match=f"^config.model.{message}") as raised:
        make(**options).check(FRAMES, WIDTH, "encoder")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["hfq", "wq_former", "sq_former"])
def test_heads_must_divide_the_encoder(name):
    with pytest.raises(UserError, match=r"^whisper: the encoder width 96 is not a multiple of 64"):
        make(adapter=name).check(FRAMES, 96, "whisper")


# ---- values ----


def test_pooling_and_stacking_see_their_own_frames():
    """4 frames, 2 tokens: the means, and the concatenations, of pairs of frames."""
    features = jnp.arange(8.0).reshape(1, 4, 2)
    assert Pooling(3, 2).gather(features, 2).tolist() == [[[1, 2], [5, 6]]]
    assert Stack(3, 2).gather(features, 2).tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


@pytest.mark.parametrize("name", ["pooling", "stack", "wq_former"])
def test_a_token_depends_on_its_own_part_only(name):
    adapter = make(adapter=name)
    features = jax.random.normal(jax.random.key(0), (1, FRAMES, WIDTH))
    params = jax.jit(adapter.init)(jax.random.key(1), features)
    changed = features.at[:, 12:18].add(features[:, :6])  # the third of ten parts
    tokens, others = (adapter.apply(params, x)[0] for x in (features, changed))
    assert np.flatnonzero(np.any(tokens != others, axis=-1)).tolist() == [2]
