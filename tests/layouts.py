"""Trains a tiny model for twenty steps on several meshes; run by test_layouts.py.

    python tests/layouts.py OUT MESH,...            # keys of MESHES, on eight virtual devices
    python tests/layouts.py OUT PROCESS_ID PORT     # one of two processes with four devices each

Writes OUT/MESH.npz: the losses of each stage, and the gradients of its first step.
"""

import os
import pathlib
import sys

import fast_compilation

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        f"--xla_force_host_platform_device_count={4 if sys.argv[3:] else 8}",
        fast_compilation.FLAGS,
    )
)

import functools

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from fastslm_jax import config as config_lib
from fastslm_jax import distributed, sharding
from fastslm_jax.data import packing
from fastslm_jax.data.prompts import Encoded
from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.training import optim
from fastslm_jax.training import step as steps

OUT, ARGUMENTS = pathlib.Path(sys.argv[1]), sys.argv[2:]
MESHES = {
    "1": (1, 1, 1),
    "8x1x1": (8, 1, 1),
    "1x8x1": (1, 8, 1),
    "1x4x2": (1, 4, 2),
    "2x2x2": (2, 2, 2),
}
STEPS, ROWS = 20, 8
SHAPE = packing.RowShape(windows=3, tokens=40, labels=24)
# {stage: row number → examples of the row as (seconds of audio or None, answer tokens)}.
STAGES = {
    "1 short": lambda n: [(0.6 + 0.05 * n, 2 + n % 3), (1.0, 3), (0.7, 1 + n % 2)],
    "2 long": lambda n: [(2.0 + 0.1 * n, 12 + n % 5)],
    "3 mixed": lambda n: [(1.7, 7)] if n % 2 else [(0.9, 2), (None, 6), (0.8, 1 + n % 4)],
}


def make_model() -> FastSLM:
    """Windows of 1 s with 3 speech tokens. LoRA dropout must be the same on every mesh."""
    return FastSLM(
        encoder=WhisperEncoder(
            width=64, num_layers=2, num_heads=2, mlp_dim=64, num_mels=16, max_positions=50
        ),
        adapter=HFQFormer(
            output_width=32, stage_tokens=(4, 4), compression_size=3, detail_recovery_layers=1
        ),
        llm=Decoder(
            vocab_size=64,
            width=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=48,
            lora=LoRA(rank=4, alpha=8.0, dropout=0.1),
        ),
    )


def make_params(model: FastSLM) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    draws = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
    return {
        path: draw * (leaves[path].shape[-2] ** -0.5)
        if path.endswith("/kernel")
        else path.endswith("/scale") + 0.1 * draw
        for path, draw in draws.items()
    }


def make_batch(model: FastSLM, stage: str, step: int) -> dict[str, np.ndarray]:
    """All rows of a step, noise as audio. The tokens are periodic, so that the loss decreases."""
    rng = np.random.default_rng(step)
    rows = []
    for number in range(ROWS):
        parts = []
        for seconds, answer in STAGES[stage](number):
            samples, num_speech = None, 0
            if seconds is not None:
                samples = rng.normal(0, 3000, round(16_000 * seconds)).astype(np.int16)
                num_speech = model.window.count(len(samples)) * model.tokens_per_window
            tokens = 1 + (np.arange(3 + num_speech + answer) + number) % 5
            mask = (np.arange(len(tokens)) >= 3 + num_speech).astype(np.float32)
            encoded = Encoded(tokens, mask, 1 if num_speech else -1, num_speech)
            parts.append((encoded, samples))
        rows.append(packing.assemble(parts, SHAPE, model.window, model.tokens_per_window))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def run(name: str, mesh: jax.sharding.Mesh) -> None:
    model = make_model()
    params = make_params(model)
    mask = optim.trainable_mask(sorted(params), config_lib.TRAINABLE)
    shardings = sharding.parameter_shardings(params, mesh)
    params = {
        path: jax.make_array_from_callback(leaf.shape, shardings[path], leaf.__getitem__)
        for path, leaf in params.items()
    }
    trained, frozen = (
        {path: leaf for path, leaf in params.items() if mask[path] == side}
        for side in (True, False)
    )
    optimizer = optim.make_optimizer("adamw", optax.constant_schedule(3e-3), b1=0.9, clip_norm=0.0)
    step_fn = jax.jit(
        functools.partial(
            steps.train_step,
            model=model,
            optimizer=optimizer,
            settings=steps.StepConfig(SHAPE.labels, loss_chunk=8),
            mesh=mesh,
        )
    )
    create = jax.jit(functools.partial(steps.TrainState.create, optimizer=optimizer))
    part, parts = distributed.rows_of_process(mesh)
    mine = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
    out = {}
    for stage in STAGES:
        state, losses = create(trained), []
        for step in range(STEPS):
            batch = {key: value[mine] for key, value in make_batch(model, stage, step).items()}
            state, metrics = step_fn(state, frozen, sharding.shard_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
            if step == 0:  # with b1 = 0.9, Adam's first moments are 0.1 times the gradients
                moments = next(
                    leaf.mu
                    for leaf in jax.tree.leaves(state.opt_state, is_leaf=is_adam)
                    if is_adam(leaf)
                )
                out |= {f"{stage}|{path}": 10 * whole(leaf) for path, leaf in moments.items()}
        out[stage] = np.array(losses)
    if jax.process_index() == 0:
        np.savez(OUT / f"{name}.npz", **out)


def is_adam(leaf: object) -> bool:
    return isinstance(leaf, optax.ScaleByAdamState)


def whole(leaf: jax.Array) -> np.ndarray:
    return np.asarray(
        leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
    )


def main() -> None:
    if len(ARGUMENTS) > 1:
        process, port = map(int, ARGUMENTS)
        distributed.initialize(f"localhost:{port}", 2, process)
        run("two processes", sharding.make_mesh(data=1, fsdp=4, tensor=2))
        return
    for name in ARGUMENTS[0].split(","):
        run(name, sharding.make_mesh(*MESHES[name], devices=jax.devices()[: np.prod(MESHES[name])]))


if __name__ == "__main__":
    main()
