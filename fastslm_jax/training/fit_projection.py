"""Fits the adapter's last layer to the language model before training, by least squares.

    python -m fastslm_jax.training.fit_projection --config=configs/X.py --workdir=runs/fitted
    python train.py --config=configs/X.py --workdir=runs/stage1 --config.init_from=runs/fitted

Stage 1 otherwise starts with speech tokens that mean nothing to the language model. Here the
projection, the linear layer that every adapter ends with, maps what the adapter computes for a
stretch of speech to the embeddings of the words spoken in it. Everything else keeps its initial
values. Use it with config.model.query_init=temporal, so that token i represents the i-th part of
its window from the start.

Words are timed by the segments of a clip, if it has any, and within them (or from the first to the
last loud moment of the clip) in proportion to their letters, so short clips are best. A tenth of
the clips is held out: the command tells how often the nearest embedding is that of the spoken word.
"""

import dataclasses
import functools
import json
import os
import pathlib
import random
import time
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict, config_flags

from fastslm_jax import cli, sharding
from fastslm_jax import config as config_lib
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data.manifest import Utterance, read_clip, read_manifest
from fastslm_jax.data.prompts import PromptTokenizer, joined
from fastslm_jax.errors import UserError
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import write_workdir
from fastslm_jax.weights.tensors import atomic_folder

FLAGS = flags.FLAGS
REQUIRED = ("config", "workdir")
BATCH = 16
RIDGE = 0.01  # of the mean squared input
SHORTEST = 0.1  # seconds of a clip
LOUD = 10 ** (-35 / 20)  # of the loudest frame
FRAME = 320  # samples, for loudness
PROJECTION = "projection"  # the last layer of every adapter


# ------------------------------------------------------------------------------------------- timing


def loud_part(samples: np.ndarray) -> tuple[float, float]:
    """Seconds from the first to the last frame of at most 35 dB below the loudest."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float32)
    loudness = np.sqrt(np.mean(frames**2, axis=1))
    loud = np.flatnonzero(loudness >= LOUD * loudness.max())
    return loud[0] * FRAME / SAMPLE_RATE, (loud[-1] + 1) * FRAME / SAMPLE_RATE


def shares(letters: Sequence[int], start: float, end: float, spans: np.ndarray) -> np.ndarray:
    """How much of the time of each span belongs to each text token: [spans, tokens].

    Rows add up to 1, or are 0 for spans outside of [start, end].

    Args:
        letters: letters of each token; the tokens share the time in proportion.
        spans: borders of the spans in seconds: [spans + 1].
    """
    weights = np.asarray(letters, np.float64) + 0.5  # tokens without letters also take time
    borders = start + np.concatenate([[0], np.cumsum(weights)]) / weights.sum() * (end - start)
    first = np.maximum(spans[:-1, None], borders[:-1])
    overlap = np.maximum(0, np.minimum(spans[1:, None], borders[1:]) - first)
    total = overlap.sum(axis=1, keepdims=True)
    is_inside = total >= np.diff(spans)[:, None] / 2
    return np.where(is_inside, overlap / np.maximum(total, 1e-9), 0.0)


# ---------------------------------------------------------------------------------------------- fit


@dataclasses.dataclass
class LeastSquares:
    """Sums over pairs of inputs x and targets y for a regression with a constant.

    Attributes:
        count: number of pairs.
        x, y: sums of inputs and of targets.
        xx, xy: sums of products.
    """

    count: int = 0
    x: np.ndarray | float = 0.0
    y: np.ndarray | float = 0.0
    xx: np.ndarray | float = 0.0
    xy: np.ndarray | float = 0.0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        x, y = x.astype(np.float64), y.astype(np.float64)
        self.count += len(x)
        self.x, self.y = self.x + x.sum(axis=0), self.y + y.sum(axis=0)
        self.xx, self.xy = self.xx + x.T @ x, self.xy + x.T @ y

    def solve(self, deviation: float) -> tuple[np.ndarray, np.ndarray]:
        """The kernel and bias whose outputs have a standard deviation of `deviation`.

        Least squares alone would give outputs that are smaller the less certain they are.
        """
        x, y = self.x / self.count, self.y / self.count
        xx, xy = self.xx / self.count - np.outer(x, x), self.xy / self.count - np.outer(x, y)
        ridge = RIDGE * np.trace(xx) / len(xx) * np.eye(len(xx))
        kernel = np.linalg.solve(xx + ridge, xy)
        kernel *= deviation / np.sqrt(np.einsum("io,ij,jo->o", kernel, xx, kernel).mean())
        return kernel, y - x @ kernel


def projection_inputs(
    model: FastSLM, params: dict, windows: jax.Array, frames: jax.Array
) -> jax.Array:
    """What the adapter's projection is applied to: [recordings of one window, tokens, width]."""
    found = []

    def record(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> object:
        if context.module.name == PROJECTION and context.method_name == "__call__":
            found.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.speech_tokens(params, windows, frames, jnp.zeros(frames.shape, jnp.int32))
    return found[-1].astype(jnp.float32)


def timed_ids(
    clip: Utterance, samples: np.ndarray, tokenizer: PromptTokenizer, spans: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """The shares of the clip's text tokens in each span, and their ids: see `shares`."""
    texts = [(s.start, s.end, s.text) for s in clip.segments if s.text.strip()]
    texts = texts or [(*loud_part(samples), clip.text)]
    # Encoded as parts of one answer: all but the first after a space.
    spoken = [joined(text) if number else text for number, (_, _, text) in enumerate(texts)]
    ids = [tokenizer.answer_ids(text)[:-1] for text in spoken]
    parts = [
        shares([len(tokenizer.tokenizer.decode(i).strip()) for i in of_text], start, end, spans)
        for of_text, (start, end, _) in zip(ids, texts, strict=True)
    ]
    share = np.concatenate(parts, axis=1)
    total = share.sum(axis=1, keepdims=True)  # 2 where two segments meet
    return share / np.maximum(total, 1), [i for of_text in ids for i in of_text]


def pairs(
    model: FastSLM, params: dict, tokenizer: PromptTokenizer, clips: Sequence[Utterance]
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """For each clip: inputs of the projection, shares of the text tokens in them, and their ids."""
    inputs = jax.jit(functools.partial(projection_inputs, model))
    spans = np.linspace(0, model.window.seconds, model.tokens_per_window + 1)
    for start in range(0, len(clips), BATCH):
        batch = clips[start : start + BATCH]
        samples = [read_clip(clip) for clip in batch]
        cut = [model.window.cut(each) for each in samples]
        cut += cut[:1] * (BATCH - len(batch))
        x = np.asarray(inputs(params, *(np.stack(arrays) for arrays in zip(*cut, strict=True))))
        for number, clip in enumerate(batch):
            share, ids = timed_ids(clip, samples[number], tokenizer, spans)
            is_speech = share.sum(axis=1) > 0
            yield x[number][is_speech], share[is_speech], ids


def fit(
    model: FastSLM, params: dict, tokenizer: PromptTokenizer, clips: Sequence[Utterance]
) -> tuple[np.ndarray, np.ndarray, dict]:
    """The kernel and bias of the projection, and the report.

    Args:
        params: the whole tree.
        clips: of one window each, in random order; the last tenth is held out.
    """
    table = params["llm"]["embed_tokens"]
    sums, held_out, used = LeastSquares(), [], set()
    num_held_out = len(clips) // 10
    bar = cli.Bar(
        pairs(model, params, tokenizer, clips), "fitting", len(clips), unit="clip", mininterval=2
    )
    for number, (x, share, ids) in enumerate(bar):
        used.update(ids)
        if number < len(clips) - num_held_out:
            embeddings = np.asarray(table[np.asarray(ids)], np.float32)
            sums.add(x, share @ embeddings)
        else:
            held_out += zip(x, np.asarray(ids)[share.argmax(axis=1)], strict=True)
    candidates = np.array(sorted(used))
    embeddings = np.asarray(table[candidates], np.float64)
    kernel, bias = sums.solve(embeddings.std())
    # Cosine similarity without the mean, so that no embedding is near to everything.
    mean = embeddings.mean(axis=0)
    embeddings = (embeddings - mean) / np.linalg.norm(embeddings - mean, axis=1, keepdims=True)
    x, spoken = np.stack([pair[0] for pair in held_out]), np.array([pair[1] for pair in held_out])
    nearest = candidates[((x @ kernel + bias - mean) @ embeddings.T).argmax(axis=1)]
    report = {
        "clips": len(clips),
        "speech_tokens": sums.count,
        "held_out": len(spoken),
        "correct": round(float(np.mean(nearest == spoken)), 4),
        "most_frequent": round(float(np.unique(spoken, return_counts=True)[1].max() / len(x)), 4),
    }
    return kernel, bias, report


def choose(config: ConfigDict, seconds: float, count: int) -> list[Utterance]:
    """Transcribed clips of at most `seconds` from the sources of the config, in random order.

    Raises:
        UserError: there are fewer than 20.
    """
    paths = sorted({source.path for source in config.data.train.values() if source.weight > 0})
    clips = [
        clip
        for path in paths
        for clip in read_manifest(pathlib.Path(path).expanduser())
        if clip.text.strip() and SHORTEST <= clip.seconds <= seconds
    ]
    if len(clips) < 20:
        raise UserError(
            f"config.data.train has {len(clips)} transcribed clips of at most {seconds:g} s, and "
            "the fit needs 20; raise --max_seconds (up to the length of a window), or add clips"
        )
    random.Random(config.seed).shuffle(clips)
    return clips[:count]


def run(config: ConfigDict, workdir: str | os.PathLike, count: int, seconds: float) -> dict:
    """Writes the working directory `workdir` with step 0, and returns the report.

    Args:
        count: how many transcribed clips to use.
        seconds: longest clip to use; longer ones than a window are never used.

    Raises:
        UserError: the config or its data cannot be used, or `workdir` is not new or empty.
    """
    config_lib.check(config)
    mesh = sharding.make_mesh(data=1, devices=jax.local_devices()[:1])
    setup = experiment.build(config, mesh=mesh)
    clips = choose(config, min(seconds, setup.model.window.seconds), count)
    with atomic_folder(workdir) as folder:
        params = experiment.init_params(setup, mesh)
        tree = unflatten_dict(params, sep="/")
        kernel, bias, report = fit(setup.model, tree, setup.prompt_tokenizer(), clips)
        path = f"{setup.model.adapter.GROUP}/{PROJECTION}"
        for leaf, value in ((f"{path}/kernel", kernel), (f"{path}/bias", bias)):
            params[leaf] = jnp.asarray(value, params[leaf].dtype)
        saved = experiment.saved_paths(params, setup.trainable)
        meta = {"config": config.to_dict(), "row": 0, "bases": setup.fingerprints()}
        write_workdir(folder, 0, {leaf: params[leaf] for leaf in saved}, meta)
    return report


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value")
    started = time.time()
    report = run(FLAGS.config, FLAGS.workdir, FLAGS.clips, FLAGS.max_seconds)
    print(
        f"{report['correct']:.1%} of {report['held_out']} held-out speech tokens are nearest to "
        "the embedding of the text token spoken in their time (the most frequent one: "
        f"{report['most_frequent']:.1%}); train with --config.init_from={FLAGS.workdir}"
    )
    print(json.dumps(report | {"seconds": round(time.time() - started, 1)}))


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config of the training.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Working directory to write; must be new or empty.")
    flags.DEFINE_integer("clips", 4000, "How many transcribed clips to use.", lower_bound=20)
    flags.DEFINE_float("max_seconds", 8.0, "Longest clip to use.", lower_bound=0.1)


if __name__ == "__main__":
    define_flags()
    cli.run(main, REQUIRED)
