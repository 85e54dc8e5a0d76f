"""Shapes, dtypes and shardings of a train step, without allocating anything.

train.py jits and runs the step; the planner compiles it for devices that need not exist.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastslm_jax import audio, compiler, memory, sharding
from fastslm_jax.data.packing import RowShape
from fastslm_jax.errors import UserError
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.training import optim
from fastslm_jax.training.experiment import Experiment, abstract_params, saved_paths
from fastslm_jax.training.step import TrainState, train_step


@dataclasses.dataclass(frozen=True)
class StepSpecs:
    """A train step, and its arguments as `jax.ShapeDtypeStruct`s with shardings.

    Attributes:
        train_step: `training.step.train_step` for this model, optimizer and mesh; see `jit`.
        mask: {path: whether the parameter is trained}.
        params: {path: shape} of all parameters.
        state: shapes of the train state.
        batch: {name: shape} of the arrays of a batch.
    """

    experiment: Experiment
    mesh: Mesh
    train_step: Callable
    mask: dict[str, bool]
    params: dict[str, jax.ShapeDtypeStruct]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for path, leaf in self.params.items() if self.mask[path]}

    @property
    def frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: leaf for path, leaf in self.params.items() if not self.mask[path]}

    @property
    def saved(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters that a checkpoint stores."""
        paths = saved_paths(self.params, self.experiment.trainable)
        return {path: self.params[path] for path in paths}

    @property
    def in_shardings(self) -> tuple:
        """Of (state, frozen, batch)."""
        return jax.tree.map(lambda leaf: leaf.sharding, (self.state, self.frozen, self.batch))

    @property
    def out_shardings(self) -> tuple:
        """Of (state, metrics); metrics are replicated."""
        return self.in_shardings[0], NamedSharding(self.mesh, PartitionSpec())

    @property
    def compiler_options(self) -> dict[str, bool]:
        return compiler.train_options(self.mesh.devices.ravel().tolist())

    def jit(self) -> jax.stages.Wrapped:
        """(state, frozen, batch) → (state, metrics). The old state is donated to the new one."""
        return jax.jit(
            self.train_step,
            in_shardings=self.in_shardings,
            out_shardings=self.out_shardings,
            compiler_options=self.compiler_options,
            donate_argnums=0,
        )


def build(experiment: Experiment, mesh: Mesh) -> StepSpecs:
    """Specs of the train step of an experiment on a mesh.

    Raises:
        UserError: the batch or a parameter cannot be sharded over the mesh, or config.trainable
            does not fit the model.
    """
    settings = experiment.settings
    sharding.check_batch(experiment.global_batch_size, settings.accumulate, mesh)
    params = abstract_params(experiment.model, experiment.base_dtype, mesh)
    mask = optim.trainable_mask(sorted(params), experiment.trainable)
    step_fn = functools.partial(
        train_step,
        model=experiment.model,
        optimizer=experiment.optimizer,
        settings=settings,
        mesh=mesh,
    )
    trained = {path: leaf for path, leaf in params.items() if mask[path]}
    state = abstract_state(trained, experiment, mesh)
    rows = NamedSharding(mesh, sharding.ROWS)
    batch = {
        name: jax.ShapeDtypeStruct((experiment.global_batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in row_arrays(experiment.model, experiment.row).items()
    }
    return StepSpecs(experiment, mesh, step_fn, mask, params, state, batch)


def abstract_state(
    trained: dict[str, jax.ShapeDtypeStruct], experiment: Experiment, mesh: Mesh
) -> TrainState:
    """The train state: optimizer leaves are sharded like their parameter, others replicated."""
    create = functools.partial(TrainState.create, optimizer=experiment.optimizer)

    def with_sharding(key_path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        path = next((key.key for key in key_path if getattr(key, "key", None) in trained), None)
        is_like = path is not None and leaf.shape == trained[path].shape
        spec = trained[path].sharding if is_like else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec)

    return jax.tree_util.tree_map_with_path(with_sharding, jax.eval_shape(create, trained))


def row_arrays(model: FastSLM, row: RowShape) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{name: (shape, dtype)} of the arrays of a row, as `data.packing.assemble` makes them."""
    of_windows = dict.fromkeys(("window_frames", "window_recording"), ((row.windows,), jnp.int32))
    names = ("tokens", "labels", "segment_ids", "position_ids", "speech_slot")
    of_tokens = dict.fromkeys(names, ((row.tokens,), jnp.int32))
    weights = dict.fromkeys(("loss_mask", "lora_gate"), ((row.tokens,), jnp.float32))
    samples = model.window.samples + 2 * audio.CONTEXT
    return {"audio": ((row.windows, samples), jnp.int16), **of_windows, **of_tokens, **weights}


# ------------------------------------------------------------------------------------------ memory


def check_capacity(specs: StepSpecs, capacity: float | None) -> None:
    """Raises before anything is loaded or compiled if a step cannot fit its devices.

    Args:
        capacity: available bytes on a device; None skips the check.

    Raises:
        memory.CapacityError: names the smallest fsdp axis that would fit, if there is one.
    """
    memory.check(
        f"config.mesh {dict(specs.mesh.shape)}: a train step",
        memory_parts(specs),
        capacity,
        lambda: _fitting_mesh(specs, capacity),
    )


def memory_parts(specs: StepSpecs) -> dict[str, int]:
    """{kind: bytes on a device} during a step, without activations."""
    settings, shape = specs.experiment.settings, specs.mesh.shape
    shards = shape["data"] * shape["fsdp"] * settings.accumulate
    micro_rows = specs.experiment.global_batch_size // shards
    labels = min(settings.loss_chunk, settings.label_slots)
    vocabulary = specs.experiment.model.llm.vocab_size // shape["tensor"]
    arguments = memory.step_bytes(
        specs.frozen, specs.state.trained, specs.state.opt_state, specs.batch
    )
    return arguments | {
        "gradients": arguments["trained"],
        "logits": 4 * micro_rows * labels * vocabulary,
    }


def _fitting_mesh(specs: StepSpecs, capacity: float) -> str:
    """Advice: the smallest fsdp axis with which a step fits the same devices."""
    mesh = specs.mesh
    tensor = mesh.shape["tensor"]
    for fsdp in range(mesh.shape["fsdp"] + 1, mesh.size // tensor + 1):
        if mesh.size % (fsdp * tensor):
            continue
        axes = {"data": mesh.size // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
        try:
            other = sharding.make_mesh(**axes, devices=list(mesh.devices.flat))
            needed = sum(memory_parts(build(specs.experiment, other)).values())
        except UserError:  # fsdp does not divide the parameters
            continue
        if needed <= capacity:
            return f"config.mesh {axes} would need {needed / memory.GIB:.2f} GiB"
    return "no mesh of these devices fits: use more devices, or fewer rows or labels"
