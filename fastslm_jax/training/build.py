"""The jitted train step of a config on a mesh, built from shapes alone: training runs it, the planner compiles it for chips
that are not there."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fastslm_jax import audio, memory, sharding
from fastslm_jax.data.packing import RowShape
from fastslm_jax.errors import UserError
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.training import experiment, optim
from fastslm_jax.training import step as steps


@dataclasses.dataclass(frozen=True)
class Training:
    """params, state and batch are abstract: shapes and types with their shardings."""

    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mask: dict[str, bool]  # by path: is it trained
    params: dict[str, jax.ShapeDtypeStruct]
    state: steps.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    train_step: Callable  # (state, frozen, batch) → (state, metrics), jitted; the state is donated

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for path, leaf in self.params.items() if self.mask[path]}

    @property
    def frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for path, leaf in self.params.items() if not self.mask[path]}


def build(config: ConfigDict, setup: experiment.Experiment, mesh: Mesh) -> Training:
    """What `train.py` runs.

    Raises:
        UserError: rows, parameters or the table of trainables do not fit.
    """
    sharding.check_batch(config.global_batch_size, config.accumulate, mesh)
    params = experiment.abstract_params(setup.model, config.model.base_dtype, mesh)
    mask = optim.trainable_mask(sorted(params), config.trainable)
    schedule, optimizer = make_optimizer(config)
    trained = {path: leaf for path, leaf in params.items() if mask[path]}
    state = jax.eval_shape(functools.partial(steps.TrainState.create, optimizer=optimizer), trained)
    placed = state_shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        placed,
    )
    row = experiment.row_shape(config)
    rows = NamedSharding(mesh, sharding.ROWS)
    train_step = jax.jit(
        functools.partial(
            steps.train_step, model=setup.model, optimizer=optimizer, seed=config.seed, label_slots=row.labels,
            loss_chunk=config.loss_chunk, accumulate=config.accumulate,
            input_token_noise=config.input_token_noise, mesh=mesh,
        ),
        in_shardings=(placed, {path: leaf.sharding for path, leaf in params.items() if not mask[path]}, rows),
        out_shardings=(placed, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )  # fmt: skip
    batch = {
        name: jax.ShapeDtypeStruct((config.global_batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in row_arrays(setup.model, row).items()
    }
    return Training(schedule, optimizer, mask, params, state, batch, train_step)


def make_optimizer(config: ConfigDict) -> tuple[optax.Schedule, optax.GradientTransformation]:
    options = config.optimizer
    schedule = optim.schedule(
        options.schedule,
        options.learning_rate,
        config.steps,
        options.warmup_steps,
        options.final_fraction,
    )
    optimizer = optim.make_optimizer(
        options.name, schedule, weight_decay=options.weight_decay, b1=options.b1, b2=options.b2, clip_norm=options.clip_norm,
        adam_learning_rate_ratio=options.adam_learning_rate_ratio,
        learning_rate_ratios=[tuple(row) for row in options.learning_rate_ratios],
    )  # fmt: skip
    return schedule, optimizer


def row_arrays(model: FastSLM, row: RowShape) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    """{name: (shape, type)} of a row's arrays, as `data.packing.assemble` makes them."""
    of_windows = dict.fromkeys(("window_frames", "window_recording"), ((row.windows,), jnp.int32))
    names = ("tokens", "labels", "segment_ids", "position_ids", "speech_slot")
    of_tokens = dict.fromkeys(names, ((row.tokens,), jnp.int32))
    weights = dict.fromkeys(("loss_mask", "lora_gate"), ((row.tokens,), jnp.float32))
    samples = model.window.samples + 2 * audio.CONTEXT
    return {"audio": ((row.windows, samples), jnp.int16), **of_windows, **of_tokens, **weights}


def state_shardings(state: steps.TrainState, mesh: Mesh):
    """Leaves of the optimiser lie like the parameter whose path and shape they have; all others are replicated."""
    by_path = sharding.parameter_shardings(state.trained, mesh)

    def place(key_path, leaf):
        path = next((key.key for key in key_path if getattr(key, "key", None) in by_path), None)
        is_like = path is not None and leaf.shape == state.trained[path].shape
        return by_path[path] if is_like else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def check_capacity(
    config: ConfigDict,
    setup: experiment.Experiment,
    built: Training,
    mesh: Mesh,
    capacity: float | None,
) -> None:
    """Raises before anything is loaded or compiled if a step cannot fit its devices.

    Args:
        capacity: available bytes on a device; None is not checked.

    Raises:
        memory.CapacityError: names the smallest fsdp axis that would fit, if there is one.
    """
    memory.check(
        f"config.mesh {dict(mesh.shape)}: a train step",
        memory_parts(config, setup, built, mesh),
        capacity,
        lambda: _fitting_mesh(config, setup, mesh, capacity),
    )


def memory_parts(
    config: ConfigDict, setup: experiment.Experiment, built: Training, mesh: Mesh
) -> dict[str, int]:
    """{kind: bytes on a device} during a step, without activations."""
    micro_rows = config.global_batch_size // (
        mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    )
    labels = min(config.loss_chunk, config.data.row.labels)
    arguments = memory.step_bytes(
        built.frozen, built.state.trained, built.state.opt_state, built.batch
    )
    return arguments | {
        "gradients": arguments["trained"],
        "logits": 4 * micro_rows * labels * setup.model.llm.vocab_size,
    }


def _fitting_mesh(
    config: ConfigDict, setup: experiment.Experiment, mesh: Mesh, capacity: float
) -> str:
    """Advice: the smallest fsdp axis with which a step fits the same devices."""
    tensor = mesh.shape["tensor"]
    for fsdp in range(mesh.shape["fsdp"] + 1, mesh.size // tensor + 1):
        if mesh.size % (fsdp * tensor):
            continue
        axes = {"data": mesh.size // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
        try:
            other = sharding.make_mesh(**axes, devices=list(mesh.devices.flat))
            needed = sum(memory_parts(config, setup, build(config, setup, other), other).values())
        except UserError:  # fsdp does not divide the parameters
            continue
        if needed <= capacity:
            return f"config.mesh {axes} would need {needed / memory.GIB:.2f} GiB"
    return "no mesh of these devices fits: use more devices, or fewer rows or labels"
