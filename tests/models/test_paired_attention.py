"""The kernel for two heads of 64 at a time against plain XLA, in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax import sharding
from fastslm_jax.models import paired_attention
from fastslm_jax.models.attention import AttentionKernel

XLA = AttentionKernel("xla")
SHAPES = {  # queries, keys, keys without padding
    "compressor": (5, 70, 70),
    "padded": (128, 128, 100),
    "blocks of queries": (640, 640, 600),  # splash attention's backward pass
}


@pytest.mark.parametrize("axes", [None, (2, 2, 2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("case", SHAPES)
def test_values_and_gradients(case, axes):
    kernel = AttentionKernel("splash_interpret", mesh=axes and sharding.make_mesh(*axes))
    queries, keys, used = SHAPES[case]
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(4, length, 4, 64)).astype(np.float32) for length in (queries, keys, keys)
    ]

    def run(kernel):
        def loss(*arrays):
            out = kernel(*arrays, keys=used)
            return jnp.sum(jnp.sin(out[:, :used])), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return out, *gradients

    for got, expected in zip(run(kernel), run(XLA), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "keys", "shards", "expected"),
    [
        ((1, 1536, 20, 64), 1536, 1, True),  # the encoder
        ((1, 50, 20, 64), 2625, 1, True),  # detail recovery
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
