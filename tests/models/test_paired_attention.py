"""The kernel for two heads of 64 at a time against plain XLA, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax.models import paired_attention
from fastslm_jax.models.attention import AttentionKernel

KEYS = 100  # of 128
KERNEL, XLA = AttentionKernel("splash_interpret"), AttentionKernel("xla")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, 128, 4, 64)).astype(np.float32) for _ in range(3)]


def run(kernel, arrays):
    """Outputs, and gradients of a weighted sum of the outputs that are no padding."""

    def loss(*arrays):
        out = kernel(*arrays, keys=KEYS)
        return jnp.sum(jnp.sin(out[:, :KEYS])), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, gradients


def test_values_and_gradients_without_the_padded_keys(arrays):
    (out, gradients), (expected, expected_gradients) = run(KERNEL, arrays), run(XLA, arrays)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, right, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "keys", "shards", "expected"),
    [
        ((1, 1536, 20, 64), 1536, 1, True),  # the encoder
        ((1, 1536, 20, 64), 1536, 4, False),  # five heads per shard
        ((1, 1500, 20, 64), 1500, 1, False),  # not padded
        ((1, 1536, 20, 128), 1536, 1, False),
        ((1, 1536, 20, 64), 4096, 1, False),  # too many scores
    ],
)
def test_what_the_kernel_takes(shape, keys, shards, expected):
    query = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    key = jax.ShapeDtypeStruct((shape[0], keys, *shape[2:]), jnp.bfloat16)
    assert paired_attention.supports(query, key, shards) is expected
