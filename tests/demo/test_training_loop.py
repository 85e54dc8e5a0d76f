"""The resumable training loop of the demo's pretrained models."""

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.demo import training_loop
from fastslm_jax.training import optim


def test_training_resumes_exactly(tmp_path):
    target = jnp.arange(6.0).reshape(2, 3)

    def loss_fn(params, noise):
        return jnp.sum(jnp.square(params["w"] - target + noise))

    def run(folder, steps):
        optimizer = optim.make_optimizer("adamw", optim.schedule("constant", 0.1, 500, 1))
        leaves, _ = training_loop.train(
            "toy", folder, steps, {"w": jnp.zeros((2, 3))}, loss_fn, optimizer, batch
        )
        return np.asarray(leaves["w"])

    def batch(step):
        return (0.1 * jax.random.normal(jax.random.key(step), (2, 3)),)

    whole = run(tmp_path / "whole", 500)
    run(tmp_path / "halves", 250)
    np.testing.assert_array_equal(run(tmp_path / "halves", 500), whole)
    np.testing.assert_allclose(whole, target, atol=0.2)
