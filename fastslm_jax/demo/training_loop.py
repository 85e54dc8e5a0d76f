"""The resumable training loop of the demo's pretrained models."""

import pathlib
import sys
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from fastslm_jax import cli
from fastslm_jax.training.checkpoint import Checkpoints

SAVE_EVERY = 250  # steps between checkpoints and reported metrics


def train(
    name: str,
    folder: pathlib.Path,
    steps: int,
    leaves: dict[str, jax.Array],
    loss_fn: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    batch_of: Callable[[int], tuple],
    metrics_of: Callable[[dict], Mapping[str, float]] = lambda _: {},
) -> tuple[dict[str, jax.Array], float]:
    """Trains, resuming from the last checkpoint in `folder`.

    Args:
        name: label of the progress bar.
        folder: where checkpoints are saved.
        steps: number of optimizer steps in total.
        leaves: initial parameters, flat: {path: array}.
        loss_fn: (parameters, *batch) -> loss.
        optimizer: optimizer of the flat parameters.
        batch_of: step -> batch; a pure function, so that the step is the whole data state.
        metrics_of: parameters -> metrics to report whenever a checkpoint is saved.

    Returns:
        the trained leaves, and the minutes spent over all attempts.
    """

    @jax.jit
    def update(
        leaves: dict[str, jax.Array], state: optax.OptState, *batch: jax.Array
    ) -> tuple[dict[str, jax.Array], optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(
            lambda leaves: loss_fn(unflatten_dict(leaves, sep="/"), *batch)
        )(leaves)
        updates, state = optimizer.update(gradients, state, leaves)
        return optax.apply_updates(leaves, updates), state, loss

    state, done, earlier_seconds = optimizer.init(leaves), 0, 0.0
    checkpoints = Checkpoints(folder, keep=1)
    restored = checkpoints.restore_latest(leaves, {"state": state})
    if restored is not None:
        done, leaves, train_state, meta = restored
        state, earlier_seconds = train_state["state"], meta["seconds"]
    started, losses = time.time(), []
    remaining = range(done + 1, steps + 1)
    for step in cli.Bar(remaining, name, steps, initial=done, unit="step", mininterval=5):
        leaves, state, loss = update(leaves, state, *batch_of(step))
        losses.append(loss)
        if step % SAVE_EVERY == 0 or step == steps:
            metrics = {"loss": float(np.mean(losses))}
            metrics |= metrics_of(unflatten_dict(leaves, sep="/"))
            report = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            cli.print_above_bars(f"{name} step {step}: {report}", sys.stdout)
            losses = []
            seconds = earlier_seconds + time.time() - started
            checkpoints.save(step, leaves, {"state": state}, {"seconds": seconds})
    checkpoints.wait()
    checkpoints.close()
    return leaves, round((earlier_seconds + time.time() - started) / 60, 1)
