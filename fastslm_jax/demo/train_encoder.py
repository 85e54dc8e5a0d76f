"""Trains the demo's small Whisper-shaped encoder with CTC on synthetic speech.

    python -m fastslm_jax.demo.train_encoder --corpus=corpus/bases --out=assets [--seed=0]

Temporary linear heads predict characters and words with CTC. Words are predicted from features
averaged over 0.2 s, so that words remain distinguishable when HFQ-Former's attention averages
features. Recordings cross window borders as they do in FastSLM: windows are encoded separately,
their features are concatenated in time, and CTC aligns the whole recording. The result,
OUT/demo_whisper, is a Hugging Face folder. Interrupt at any time; rerunning resumes.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jiwer
import numpy as np
import optax
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import audio, cli, devices
from fastslm_jax.demo import corpus, examples, model_folder, training_loop
from fastslm_jax.demo.speech_batches import (
    CHARACTERS,
    Clips,
    StreamBatches,
    pad_labels,
    read_clips,
)
from fastslm_jax.models import log_mel
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.training import optim
from fastslm_jax.weights import engine, layouts, pretrained

CONFIG = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 128,
    "encoder_layers": 4,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 512,
    "num_mel_bins": 80,
    "max_source_positions": 300,
    "activation_function": "gelu",
}
WORD_FEATURES = 10  # features averaged for a word label: 0.2 s

FLAGS = flags.FLAGS

Logits = tuple[jax.Array, jax.Array, jax.Array]
Forward = Callable[[dict, jax.Array, jax.Array, jax.Array], Logits]


def define_flags() -> None:
    flags.DEFINE_string(
        "corpus", "corpus/bases", "Folder of the synthetic corpus; built if it does not exist."
    )
    flags.DEFINE_string("out", "assets", "Output folder; the model is OUT/demo_whisper.")
    flags.DEFINE_integer("seed", 0, "Seed of the corpus, the parameters and the batches.")
    flags.DEFINE_integer("utterances", 12_000, "Training utterances of the corpus.")
    flags.DEFINE_integer("encoder_steps", 6000, "Optimizer steps.")
    flags.DEFINE_string(
        "encoder_init",
        "",
        "Folder of an encoder to start from, at half the learning rate "
        "(default: random parameters).",
    )


class Heads(nn.Module):
    """Linear heads on features [batch * windows, t, width], concatenated to `rows` recordings.

    Returns logits of characters by CTC [rows, T, 28], of words by CTC [rows, T / WORD_FEATURES,
    num_words + 1], and of the word at each feature [rows, T, num_words + 1] (0: no word).
    """

    num_words: int

    @nn.compact
    def __call__(self, features: jax.Array, rows: int) -> Logits:
        features = features.reshape(rows, -1, features.shape[-1])
        means = jnp.mean(features.reshape(rows, -1, WORD_FEATURES, features.shape[-1]), axis=2)
        return (
            nn.Dense(len(CHARACTERS) + 1, name="characters")(features),
            nn.Dense(self.num_words + 1, name="words")(means),
            nn.Dense(self.num_words + 1, name="frames")(features),
        )


def make_forward(encoder: WhisperEncoder, heads: Heads, positions: jax.Array) -> Forward:
    """Builds (parameters, windows, frames, recordings) -> logits of the heads.

    `positions` is the encoder's position table, which is not trained.
    """

    def forward(
        params: dict, windows: jax.Array, frames: jax.Array, recordings: jax.Array
    ) -> Logits:
        mel = log_mel.log_mel(windows, frames, recordings, encoder.num_mels)
        mel = mel.reshape(-1, *mel.shape[2:])
        features = encoder.apply({"params": {**params["encoder"], "positions": positions}}, mel)
        return heads.apply({"params": params["heads"]}, features, len(windows))

    return forward


def make_loss(forward: Forward) -> Callable[..., jax.Array]:
    """Builds (parameters, *batch) -> both CTC losses per label plus the cross-entropy of words."""

    def loss_fn(
        params: dict,
        windows: jax.Array,
        frames: jax.Array,
        recordings: jax.Array,
        characters: jax.Array,
        words: jax.Array,
        spoken: jax.Array,
    ) -> jax.Array:
        *ctc, by_feature = forward(params, windows, frames, recordings)
        total = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(by_feature, spoken))
        for logits, labels in zip(ctc, (characters, words), strict=True):
            padding = (labels == 0).astype(jnp.float32)
            losses = optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, padding)
            total += jnp.mean(losses / jnp.maximum(1, jnp.sum(labels > 0, axis=1)))
        return total

    return loss_fn


def error_rates(
    forward: Forward,
    params: dict,
    spec: audio.WindowSpec,
    clips: Clips,
    vocabulary: Mapping[str, int],
    limit: int | None = None,
) -> dict[str, float]:
    """Error rates in percent on single utterances, with greedy CTC decoding.

    Returns:
        dev_cer and dev_wer of the two CTC heads, and dev_frame_error: the fraction of features
        inside words whose word is wrong.
    """
    words = ["", *vocabulary]
    decoded_characters, decoded_words, right, count = [], [], 0, 0
    for start in range(0, len(clips.texts[:limit]) - 15, 16):
        cut = [spec.cut(clip) for clip in clips.samples[start : start + 16]]
        windows, frames = np.stack([c[0] for c in cut]), np.stack([c[1] for c in cut])
        by_character, by_word, by_feature = forward(
            params, windows, frames, np.zeros(frames.shape, np.int32)
        )
        labels = pad_labels(clips.frames[start : start + 16], by_feature.shape[1])
        right += np.sum((np.argmax(by_feature, -1) == labels) & (labels > 0))
        count += np.sum(labels > 0)
        decoded_characters += [
            "".join(CHARACTERS[i - 1] for i in ids) for ids in _greedy_ctc(by_character)
        ]
        decoded_words += [" ".join(words[i] for i in ids) for ids in _greedy_ctc(by_word)]
    texts = clips.texts[: len(decoded_words)]
    return {
        "dev_cer": round(100 * jiwer.cer(texts, decoded_characters), 2),
        "dev_wer": round(100 * jiwer.wer(texts, decoded_words), 2),
        "dev_frame_error": round(100 * float(1 - right / count), 2),
    }


def _greedy_ctc(logits: jax.Array) -> list[list[int]]:
    """Labels of the best path: repetitions and blanks (0) removed."""
    return [
        [int(i) for i, before in zip(path, [0, *path[:-1]], strict=True) if i and i != before]
        for path in np.argmax(logits, -1)
    ]


def train_encoder(
    folder: pathlib.Path, corpus_folder: pathlib.Path, steps: int, seed: int, init: str = ""
) -> tuple[dict, dict[str, object]]:
    """Trains the encoder.

    Args:
        folder: where checkpoints are saved.
        corpus_folder: corpus with train and dev sets.
        steps: optimizer steps.
        seed: seed of the parameters and the batches.
        init: folder of an encoder to start from; "": random parameters.

    Returns:
        the encoder's parameters, and figures of the training.
    """
    encoder, history = pretrained.whisper_from_config(CONFIG), {}
    vocabulary = {word: i + 1 for i, word in enumerate(examples.lexicon())}
    heads = Heads(len(vocabulary))
    spec = audio.WindowSpec(2 * encoder.max_positions)
    batches = StreamBatches(read_clips(corpus_folder, "train", vocabulary), vocabulary, spec)
    dev = read_clips(corpus_folder, "dev", vocabulary)
    mel = jnp.zeros((1, spec.frames, encoder.num_mels))
    features = jnp.zeros((2, encoder.max_positions, encoder.width))
    params = {
        "encoder": encoder.init(jax.random.key(seed), mel)["params"],
        "heads": heads.init(jax.random.key(seed + 1), features, 1)["params"],
    }
    if init:
        history = model_folder.earlier_training(init)
        params["encoder"] = pretrained.load_whisper(init, params["encoder"])
    positions = params["encoder"].pop("positions")
    forward = jax.jit(make_forward(encoder, heads, positions))
    learning_rate = optim.schedule("linear", 1e-2 if init else 2e-2, steps, 200)
    optimizer = optim.make_optimizer(
        "muon", learning_rate, adam_learning_rate_ratio=0.4, weight_decay=0.01
    )
    leaves, minutes = training_loop.train(
        "encoder",
        folder / model_folder.CHECKPOINTS,
        steps,
        flatten_dict(params, sep="/"),
        make_loss(forward),
        optimizer,
        lambda step: batches.draw(np.random.default_rng((seed, step))),
        lambda params: error_rates(forward, params, spec, dev, vocabulary, 64),
    )
    params = unflatten_dict(leaves, sep="/")
    figures = {
        "steps": steps,
        "minutes": minutes,
        "parameters": optim.count(flatten_dict(params["encoder"])),
        **history,
        **error_rates(forward, params, spec, dev, vocabulary),
    }
    return {**params["encoder"], "positions": positions}, figures


def corpus_counts(utterances: int) -> dict[str, dict[str, int]]:
    """Sizes of the encoder's corpus: no tests, and 200 dev utterances."""
    counts = {name: dict.fromkeys(tasks, 0) for name, tasks in corpus.DEFAULT_COUNTS.items()}
    counts["train"] |= {"asr": utterances, "ssum": utterances // 6, "sqqa": utterances // 4}
    counts["dev"]["asr"] = 200
    return counts


def main(_: Sequence[str]) -> None:
    counts = corpus_counts(FLAGS.utterances)
    corpus.build_corpus(FLAGS.corpus, FLAGS.seed + 1000, counts, devices.cores())
    unfinished = model_folder.create_unfinished(pathlib.Path(FLAGS.out), "demo_whisper")
    params, figures = train_encoder(
        unfinished, pathlib.Path(FLAGS.corpus), FLAGS.encoder_steps, FLAGS.seed, FLAGS.encoder_init
    )
    command = model_folder.command_line(
        "train_encoder", ("seed", "utterances", "encoder_steps", "corpus", "out", "encoder_init")
    )
    training = {"command": command, "seed": FLAGS.seed, **figures}
    tensors = engine.store(params, layouts.hf_whisper())
    model_folder.write(unfinished, CONFIG, tensors, training)
    print(f"{model_folder.publish(unfinished)}: {json.dumps(figures)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
