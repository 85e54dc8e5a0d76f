"""Builds, compiles and times train steps on synthetic rows, for `step.py`."""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax import sharding
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data import packing, prompts
from fastslm_jax.plan import compile as plan
from fastslm_jax.training import experiment, optim
from fastslm_jax.training import step as steps

FLAGS = flags.FLAGS
Batch = dict[str, np.ndarray]
# A call without arguments, and its peak memory in GiB (None: unknown).
Case = tuple[Callable[[], object], float | None]


class Bench:
    """A model with its parameters, and its train step on a batch."""

    def __init__(self, config: ConfigDict, params: dict[str, jax.Array] | None = None) -> None:
        self.config, self.setup = config, experiment.build(config)
        self.model, self.tokenizer = self.setup.model, self.setup.prompt_tokenizer()
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self.params = params or experiment.init_params(self.setup, mesh)

    def batch(self, rows: Sequence[Sequence[tuple[float, int]]], shape: packing.RowShape) -> Batch:
        """A batch of noise from rows of examples (seconds, answer tokens)."""
        rng, packed = np.random.default_rng(0), []
        window, tokens_per_window = self.model.window, self.model.tokens_per_window
        for row in rows:
            parts = []
            for seconds, answer in row:
                samples = rng.normal(0, 3000, round(seconds * SAMPLE_RATE)).astype(np.int16)
                num_speech = window.count(len(samples)) * tokens_per_window
                prompt = self.tokenizer.encode("asr", None, None, num_speech)
                tokens = np.concatenate([prompt.tokens, rng.integers(1, 1000, answer)])
                mask = np.repeat(np.float32([0, 1]), [len(prompt.tokens), answer])
                encoded = prompts.Encoded(tokens, mask, prompt.speech_start, num_speech)
                parts.append((encoded, samples))
            packed.append(packing.assemble(parts, shape, window, tokens_per_window))
        return {name: np.stack([row[name] for row in packed]) for name in packed[0]}

    def long_row(self, minutes: float = 3.0) -> tuple[packing.RowShape, Batch]:
        """One recording that fills a row, with three answer tokens per second."""
        seconds = 60 * minutes
        labels, windows = int(3 * seconds), self.model.window.count(round(seconds * SAMPLE_RATE))
        num_speech = windows * self.model.tokens_per_window
        prompt = len(self.tokenizer.encode("asr", None, None, num_speech).tokens)
        shape = packing.RowShape(windows, -(-(prompt + labels) // 128) * 128, labels)
        return shape, self.batch([[(seconds, labels)]], shape)

    def step(
        self,
        shape: packing.RowShape,
        trainable: Sequence[tuple[str, bool]] = config_lib.TRAINABLE,
    ) -> tuple[Callable, steps.TrainState, dict[str, jax.Array]]:
        """The step function of (state, frozen, batch), its state, and the frozen parameters."""
        mask = optim.trainable_mask(sorted(self.params), trainable)
        trained, frozen = optim.split(self.params, mask)
        function = functools.partial(
            steps.train_step,
            model=self.model,
            optimizer=self.setup.optimizer,
            settings=steps.StepConfig(shape.labels, FLAGS.loss_chunk),
        )
        return function, steps.TrainState.create(trained, self.setup.optimizer), frozen


def compile_case(function: Callable, *inputs: object) -> Case:
    """Memory is that of arguments, results and temporaries, as planned by XLA."""
    compiled = jax.jit(function).lower(*inputs).compile()
    inputs = jax.device_put(inputs)
    return lambda: compiled(*inputs), plan.total_bytes(compiled.memory_analysis()) / 2**30


def time_cases(*cases: Case) -> list[dict[str, float | None]]:
    """Median seconds of each case. The cases alternate, because the machine's speed drifts."""
    times = [[] for _ in cases]
    for repeat in range(FLAGS.repeats + 1):
        for seconds, (call, _) in zip(times, cases, strict=True):
            time.sleep(0.5)  # the thread pool of the previous case keeps spinning for a while
            started = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:  # the first call warms up
                seconds.append(time.perf_counter() - started)
    return [
        {"seconds": float(np.median(seconds)), "gib": gib}
        for seconds, (_, gib) in zip(times, cases, strict=True)
    ]
