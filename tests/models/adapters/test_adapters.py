"""What holds for every adapter: shapes, gradients, independent windows, FLOPs, parameter counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import config as config_lib
from fastslm_jax.models.adapters import ADAPTERS
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
