"""The kernel for norm and rotation of heads against plain XLA, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax import sharding
from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.decoder import HeadRotation, RoPE

ROWS, LENGTH, HEADS, HEAD_DIM = 2, 512, 2, 128


@pytest.mark.parametrize(("has_norm", "axes"), [(True, None), (False, None), (True, (2, 1, 2))])
def test_values_and_gradients(has_norm, axes):
    devices = jax.devices()[:4]
    mesh = axes and sharding.make_mesh(*axes, devices=devices)
    kernel = AttentionKernel("splash_interpret", mesh=mesh)
    layer = HeadRotation(HEAD_DIM, RoPE(), 1e-6, has_norm, kernel, jnp.float32)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, LENGTH, HEADS * HEAD_DIM)).astype(np.float32)
    weights = rng.normal(size=(ROWS, LENGTH, HEADS, HEAD_DIM)).astype(np.float32)
    positions = np.stack([np.arange(LENGTH), np.arange(LENGTH)[::-1]])
    params = {"scale": rng.normal(size=HEAD_DIM).astype(np.float32)} if has_norm else {}

    def loss(params, x, factor):
        out = layer.apply({"params": params}, x, positions, factor)
        out = out if factor else out * 0.5
        return jnp.sum(out * weights), out

    assert kernel.rotates(x, x, HEAD_DIM)
    apply = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (d_params, d_x), out = apply(params, x, 0.5)
    (expected_d_params, expected_d_x), expected = apply(params, x, None)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(d_x, expected_d_x, atol=1e-5)
    for name in params:
        np.testing.assert_allclose(d_params[name], expected_d_params[name], rtol=1e-4, atol=1e-3)
