"""Trains the two small bases of the demo from nothing: a Whisper-shaped encoder and a Qwen3-shaped language model.

    python -m fastslm_jax.demo.train_bases --corpus=corpus/bases --out=assets [--part=all|encoder|llm] [--seed=0]

The encoder learns CTC on characters and on words through linear layers that are thrown away. A word is read from the mean of
features over 0.2 s: what attention averages later still tells the words. Recordings run over window borders, as they do later:
windows are encoded apart, their features joined in time, and CTC aligns the whole.
Killed, it goes on from its last checkpoint when it is run again.

The language model learns the generator's text: plain sentences in English and Korean, and the four tasks in chat form
with the words themselves where later the speech stands. Most of those words are blurred: laid out in time, and averaged over ten
positions for six seconds. Speech tokens hold more than a word each, and a decoder that has only read whole words cannot take them
apart: it repeated 7 % of such sentences exactly (a large model brings that with it, or learns it from thousands of hours).
Both are written as Hugging Face folders.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jiwer
import ml_dtypes
import numpy as np
import optax
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from tqdm import tqdm

from fastslm_jax import audio, cli
from fastslm_jax.data import prompts
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import corpus as synthetic
from fastslm_jax.demo import sentences
from fastslm_jax.models import log_mel
from fastslm_jax.training import optim
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import engine, layouts, pretrained

WHISPER_CONFIG = {
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
QWEN3_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1536,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPEECH_INSTRUCTIONS = {name: task.instruction for name, task in TASKS.items()}
TEXT_INSTRUCTIONS = {
    "asr": "Repeat the text.",
    "ast": "Translate the text into Korean.",
    "ssum": "Summarize the text.",
    "sqqa": "Answer the question in the text.",
}
TEXT_MARK = "<TEXT>"
FEATURE_SAMPLES = 320  # of a feature
WORD_FRAMES = 10  # features that a word label is read from: a mean over 0.2 s
CHARACTERS = " abcdefghijklmnopqrstuvwxyz"

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "corpus",
    "corpus/bases",
    "Folder of the synthetic corpus that the encoder hears (made if it is missing).",
)
flags.DEFINE_string("out", "assets", "Where the two folders go: OUT/demo_whisper and OUT/demo_llm.")
flags.DEFINE_enum("part", "all", ["all", "encoder", "llm"], "What to train.")
flags.DEFINE_integer("seed", 0, "Seed of everything.")
flags.DEFINE_integer("utterances", 12_000, "Training utterances of the corpus.")
flags.DEFINE_integer("encoder_steps", 6000, "Optimiser steps of the encoder.")
flags.DEFINE_integer("llm_steps", 4000, "Optimiser steps of the language model.")
flags.DEFINE_string(
    "encoder_init", "", "Folder of an encoder to go on from, at half the learning rate."
)
flags.DEFINE_string(
    "llm_init",
    "",
    "Folder of a language model to go on from, at half the learning rate (default: from nothing).",
)


def train(
    name: str,
    folder: pathlib.Path,
    steps: int,
    leaves: dict[str, jax.Array],
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    batch_of: Callable[[int], tuple],
    figures_of: Callable[[dict], dict] = lambda _: {},
) -> tuple[dict[str, jax.Array], float]:
    """A training loop that goes on where it was killed.

    Args:
        folder: where its checkpoints lie.
        leaves: first parameters, flat.
        loss_fn: (parameters, *batch) → loss.
        batch_of: step → batch, a pure function, so that the step is the whole state of the data.
        figures_of: parameters → figures to show every 250 steps.

    Returns:
        the trained leaves, and the minutes that all attempts took.
    """

    @jax.jit
    def update(leaves, state, *batch):
        loss, gradients = jax.value_and_grad(
            lambda leaves: loss_fn(unflatten_dict(leaves, sep="/"), *batch)
        )(leaves)
        updates, state = optimizer.update(gradients, state, leaves)
        return optax.apply_updates(leaves, updates), state, loss

    state, first, before = optimizer.init(leaves), 0, 0.0
    checkpoints = Checkpoints(folder, keep=1)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (leaves, {"state": state}),
    )
    restored = checkpoints.restore_latest(*abstract)
    if restored is not None:
        first, leaves, train, meta = restored
        state, before = train["state"], meta["seconds"]
    started, losses = time.time(), []
    for step in tqdm(
        range(first + 1, steps + 1),
        desc=name,
        unit="step",
        initial=first,
        total=steps,
        mininterval=5,
    ):
        leaves, state, loss = update(leaves, state, *batch_of(step))
        losses.append(loss)
        if step % 250 == 0 or step == steps:
            figures = {
                "loss": float(np.mean(losses)),
                **figures_of(unflatten_dict(leaves, sep="/")),
            }
            tqdm.write(
                f"{name} step {step}: "
                + "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            )
            losses = []
            checkpoints.save(
                step, leaves, {"state": state}, {"seconds": before + time.time() - started}
            )
    checkpoints.wait()
    checkpoints.close()
    return leaves, round((before + time.time() - started) / 60, 1)


# ---------------------------------------------------------------------------------------------- the language model


def train_tokenizer(folder: pathlib.Path, vocab_size: int, seed: int) -> None:
    """A byte-level BPE with Qwen's chat markers on the generator's text, as a Hugging Face tokenizer folder."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        instruction
        for table in (TEXT_INSTRUCTIONS, SPEECH_INSTRUCTIONS)
        for instruction in table.values()
    ] * 50
    for example in sentences.text_examples("train", seed, 40_000):
        texts += [
            example.text,
            " " + example.text,
            example.answer,
        ]  # a leading space: words read alike at the start and inside
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


BLUR_WORDS = 8  # of a blurred position, at most


def blurred(
    words: list[tuple[int, int]], silence: int, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Words as speech tokens would hold them: ten positions for six seconds, each a mean of what is said around its time.

    Words get durations, breaks and a tempo; a position is the mean of the words (and of `silence`) under a triangle inside its
    window.

    Args:
        words: (id, characters) of each.

    Returns:
        ids and weights [positions, BLUR_WORDS]; the weights of a position sum to one.
    """
    tempo, frame = rng.uniform(0.8, 1.25), 0.02
    time, spoken = rng.uniform(0.0, 0.3), []
    for word, characters in words:
        time += rng.uniform(0.0, 0.7) if rng.random() < 0.03 else 0.0
        seconds = tempo * (0.14 + 0.05 * characters) * rng.uniform(0.8, 1.2)
        spoken.append((word, time, time + seconds))
        time += seconds
    windows = max(1, int(np.ceil(time / 6.0)))
    said = np.full(round(windows * 6.0 / frame), -1)
    for index, (_, start, end) in enumerate(spoken):
        said[round(start / frame) : round(end / frame)] = index
    reach = rng.uniform(0.35, 0.9)
    times, centres = (np.arange(300) + 0.5) * frame, 0.6 * (np.arange(10) + 0.5)
    triangles = np.maximum(0.0, 1 - np.abs(times - centres[:, None]) / reach)
    triangles /= triangles.sum(axis=1, keepdims=True)
    present = said[:, None] == np.arange(-1, len(spoken))  # [frames, silence and words]
    weights = (triangles @ present.reshape(windows, 300, -1)).reshape(10 * windows, -1)
    heaviest = np.argsort(-weights, axis=1)[:, :BLUR_WORDS]
    heaviest = np.pad(heaviest, ((0, 0), (0, BLUR_WORDS - heaviest.shape[1])), mode="edge")
    chosen = np.take_along_axis(weights, heaviest, axis=1)
    chosen[:, 1:] *= heaviest[:, 1:] != heaviest[:, :-1]  # padding weighs nothing
    return np.array([silence, *(word for word, _, _ in spoken)])[heaviest], chosen / chosen.sum(
        axis=1, keepdims=True
    )


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as a language model reads it. Position i is fed the mean of the embeddings of `ids[i]`, weighted by `weights[i]`,
    with noise of `noise[i]` times an embedding's size; to predict tokens[i] before it counts `loss[i]`.

    Shapes: tokens, loss, noise [length]; ids, weights [length, BLUR_WORDS].
    """

    tokens: np.ndarray
    loss: np.ndarray
    noise: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def plain(ids: Sequence[int], loss: float) -> Text:
    """Every position is fed its own token."""
    table, weights = (
        np.zeros((len(ids), BLUR_WORDS), np.int32),
        np.zeros((len(ids), BLUR_WORDS), np.float32),
    )
    table[:, 0], weights[:, 0] = ids, 1.0
    return Text(
        np.array(ids, np.int32),
        np.full(len(ids), loss, np.float32),
        np.zeros(len(ids), np.float32),
        table,
        weights,
    )


def chat(
    tokenizer,
    text: str,
    instruction: str,
    answer: str,
    blur: random.Random | None,
    slips: random.Random | None = None,
) -> Text:
    """A text with an instruction, and its answer. With `blur`, the text is blurred and noisy; with `slips`, the answer is read
    with mistakes.
    """
    messages = [{"role": "user", "content": f"{TEXT_MARK}\n{instruction}"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    target = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    target = plain(
        target, max(1.0, 12 / len(target))
    )  # every answer weighs the same up to 12 tokens: short ones would drown
    target = with_slips(target, slips) if slips else target
    if blur is None:
        return joined(plain(tokenizer(prompt.replace(TEXT_MARK, text))["input_ids"], 0.02), target)
    before, after, words = (
        tokenizer(part)["input_ids"] for part in (*prompt.split(TEXT_MARK), text)
    )
    silence = tokenizer.pad_token_id
    ids, weights = blurred(
        [(id, len(tokenizer.decode([id]).strip())) for id in words], silence, blur
    )
    unseen = np.zeros(len(ids), np.float32)
    speech = Text(
        np.full(len(ids), silence, np.int32), unseen, unseen + blur.uniform(0.0, 0.6), ids, weights
    )
    return joined(plain(before, 0.0), speech, plain(after, 0.0), target)


SLIP = 0.08  # of a transcript's words, in half of the long ones


def with_slips(text: Text, rng: random.Random) -> Text:
    """The same tokens to predict, but some inputs are other tokens of the text: a model that generates reads its own mistakes,
    and must find its place again.
    """
    ids = text.ids.copy()
    slipped = [i for i in range(len(ids)) if rng.random() < SLIP]
    ids[slipped, 0] = rng.choices(text.ids[:, 0].tolist(), k=len(slipped))
    return dataclasses.replace(text, ids=ids)


def joined(*parts: Text) -> Text:
    """One text of several."""
    return Text(
        *(
            np.concatenate([getattr(part, f.name) for part in parts])
            for f in dataclasses.fields(Text)
        )
    )


def text_rows(tokenizer, seed: int, step: int, length: int, batch: int, sentences_a_text: int = 0):
    """Packed text of a step: segment ids, positions [batch, length], and the fields of `Text`, each [batch, length, …].

    sentences_a_text: rows are of transcripts to repeat, of up to so many sentences; 0: of all tasks.
    """
    rng = random.Random(f"rows/{seed}/{step}")

    def item() -> Text:
        if sentences_a_text:
            count = rng.randint(sentences_a_text // 8, sentences_a_text)
            text = " ".join(sentences.example("asr", rng, "train").text for _ in range(count))
            instruction = rng.choice((TEXT_INSTRUCTIONS, SPEECH_INSTRUCTIONS))["asr"]
            blur, slips = (
                rng if rng.random() < probability else None for probability in (0.8, 0.5)
            )
            return chat(tokenizer, text, instruction, text, blur, slips)
        if rng.random() < 0.1:
            drawn = sentences.example("ast", rng, "train")
            return plain(
                tokenizer(rng.choice((drawn.text, drawn.answer)))["input_ids"]
                + [tokenizer.eos_token_id],
                1.0,
            )
        task = rng.choices(("asr", "ast", "ssum", "sqqa"), (3, 2, 2, 5))[0]
        text, answer = (lambda e: (e.text, e.answer))(sentences.example(task, rng, "train"))
        if task == "asr":
            count = 1 if rng.random() < 0.5 else rng.randint(1, max(1, length // 34))
            text = answer = " ".join(
                sentences.example("asr", rng, "train").text for _ in range(count)
            )
        instruction = rng.choice((TEXT_INSTRUCTIONS, SPEECH_INSTRUCTIONS))[task]
        return chat(tokenizer, text, instruction, answer, rng if rng.random() < 0.7 else None)

    segments, positions = np.zeros((2, batch, length), np.int32)
    rows = []
    for row in range(batch):
        at, parts = 0, []
        while True:
            drawn = item()
            size = len(drawn.tokens)
            if at + size > length:
                if at:
                    break
                continue  # a single text longer than the row: draw another
            parts.append(drawn)
            segments[row, at : at + size], positions[row, at : at + size] = (
                len(parts),
                np.arange(size),
            )
            at += size
        rows.append(joined(*parts, plain([0] * (length - at), 0.0)))
    return (
        segments,
        positions,
        *(np.stack([getattr(row, f.name) for row in rows]) for f in dataclasses.fields(Text)),
    )


def train_llm(out: pathlib.Path, steps: int, seed: int, init: str = "") -> dict:
    """Trains the language model in the folder `out`, from nothing or from the folder `init`. Returns its figures."""
    config, history = QWEN3_CONFIG, {}
    model = pretrained.qwen3_from_config(config)
    params = model.init(
        jax.random.key(seed), jnp.zeros((1, 2, model.width)), jnp.zeros((1, 2), jnp.int32)
    )["params"]
    if init:
        history = {"went_on_from": json.loads((pathlib.Path(init) / "TRAINING.json").read_text())}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        params = pretrained.load_qwen3(pathlib.Path(init), abstract)
        for file in pathlib.Path(init).glob("*token*"):
            shutil.copy(file, out)
        shutil.copy(pathlib.Path(init) / "chat_template.jinja", out)
    elif not (out / "tokenizer.json").exists():
        train_tokenizer(out, config["vocab_size"] - 64, seed)
    tokenizer = prompts.load_tokenizer(out, config["vocab_size"])

    def loss_fn(params, segments, positions, tokens, loss, *inputs):
        hidden, _ = model.apply(
            {"params": params}, mixed(model, params, *inputs), positions, segments
        )
        logits = model.apply({"params": params}, hidden[:, :-1], method="logits")
        loss = jnp.where(
            positions[:, 1:] > 0, loss[:, 1:], 0
        )  # the first token of a text cannot be foretold
        return jnp.sum(
            optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]) * loss
        ) / jnp.sum(loss)

    def batch_of(step):  # every second step has long rows, for transcripts of three minutes
        return text_rows(tokenizer, seed, step, *((1344, 2, 46) if step % 2 == 0 else (160, 12)))

    learning_rate = optim.schedule("linear", 5e-3 if init else 1e-2, steps, 100)
    optimizer = optim.make_optimizer(
        "muon", learning_rate, adam_learning_rate_ratio=0.3, weight_decay=0.01
    )
    accuracy = text_task_accuracy(model, tokenizer, 100)
    leaves, minutes = train(
        "llm", out / "training", steps, flatten_dict(params, sep="/"), loss_fn, optimizer, batch_of, accuracy
    )  # fmt: skip
    params = unflatten_dict(leaves, sep="/")
    figures = {"steps": steps, "minutes": minutes, "parameters": optim.count(leaves), **history}
    figures["dev_exact_match"] = accuracy(params)
    tensors = {
        key: value.astype(ml_dtypes.bfloat16)
        for key, value in engine.store(params, layouts.hf_qwen3())
    }
    write_folder(out, "llm", config, tensors, figures)
    return figures


def mixed(model, params: dict, noise: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """The inputs [b, length, d] that the fields of `Text` describe."""
    embeddings = jnp.einsum(
        "blkd,blk->bld", model.apply({"params": params}, ids, method="embed"), weights
    )
    size = jnp.sqrt(jnp.mean(jnp.square(params["embed_tokens"])))
    return embeddings + size * noise[:, :, None] * jax.random.normal(
        jax.random.key(jnp.sum(ids)), embeddings.shape
    )


def text_task_accuracy(model, tokenizer, count: int) -> Callable[[dict], dict[str, float]]:
    """parameters → of each task, and of each with a blurred text: the fraction of dev examples answered exactly (teacher-forced
    greedy: every token right).
    """

    @jax.jit
    def predict(params, *inputs):
        embeddings = mixed(model, params, *inputs)
        hidden, _ = model.apply(
            {"params": params}, embeddings, jnp.broadcast_to(jnp.arange(192), embeddings.shape[:2])
        )
        return jnp.argmax(model.apply({"params": params}, hidden, method="logits"), -1)

    batches = {}
    for blur in (False, True):
        rng = random.Random("text accuracy")
        for task in TASKS:
            rows = []
            for _ in range(count):
                drawn = sentences.example(task, rng, "dev")
                text = chat(
                    tokenizer,
                    drawn.text,
                    TEXT_INSTRUCTIONS[task],
                    drawn.answer,
                    rng if blur else None,
                )
                rows.append(joined(text, plain([0] * (192 - len(text.tokens)), 0.0)))
            batches[f"{task}_blurred" if blur else task] = [
                np.stack([getattr(row, field.name) for row in rows])
                for field in dataclasses.fields(Text)
            ]

    def accuracy(params):
        results = {}
        for name, (tokens, loss, *inputs) in batches.items():
            right = (np.asarray(predict(params, *inputs))[:, :-1] == tokens[:, 1:]) | (
                loss[:, 1:] < 1
            )
            results[name] = float(right.all(axis=1).mean())
        return results

    return accuracy


# -------------------------------------------------------------------------------------------------------- the encoder


class Heads(nn.Module):
    """Throw-away linear heads on joined features [b, t, d]: logits [rows, t, 28] of characters by CTC, [rows, t / WORD_FRAMES,
    words + 1] of words by CTC, and [rows, t, words + 1] of the word that is being spoken (0: none).
    """

    num_words: int

    @nn.compact
    def __call__(self, features, rows: int):
        features = features.reshape(rows, -1, features.shape[-1])
        means = jnp.mean(features.reshape(rows, -1, WORD_FRAMES, features.shape[-1]), axis=2)
        return (
            nn.Dense(len(CHARACTERS) + 1, name="characters")(features),
            nn.Dense(self.num_words + 1, name="words")(means),
            nn.Dense(self.num_words + 1, name="frames")(features),
        )


@dataclasses.dataclass
class StreamBatches:
    """Batches of recordings over `windows` windows: one stream of clips, or one clip in each window."""

    clips: list[np.ndarray]
    texts: list[str]
    frames: list[np.ndarray]
    words: dict[str, int]
    spec: audio.WindowSpec
    windows: int = 2
    batch: int = 4

    def __post_init__(self):
        self._short = [i for i, clip in enumerate(self.clips) if self.spec.count(len(clip)) == 1]

    def draw(self, rng: np.random.Generator):
        """One batch: windows [b, w, samples], valid frames, recordings, character and word labels (0 is blank and padding), and
        the word of every feature [b, w · 300].
        """
        drawn = [self._row(rng) for _ in range(self.batch)]
        windows, frames, recordings, texts, spoken = zip(*drawn, strict=True)
        characters = [[CHARACTERS.index(c) + 1 for c in text] for text in texts]
        words = [[self.words[w] for w in text.split()] for text in texts]
        return (
            np.stack(windows),
            np.stack(frames),
            np.stack(recordings),
            _pad(characters, 144 * self.windows),
            _pad(words, 32 * self.windows),
            _pad(spoken, self.windows * self.spec.samples // FEATURE_SAMPLES),
        )

    def _row(self, rng):
        if rng.random() < 0.5:
            picked = rng.choice(self._short, self.windows)
            cut = [self.spec.cut(self.clips[i]) for i in picked]
            windows, frames = (np.concatenate([part[j] for part in cut]) for j in range(2))
            length = self.spec.samples // FEATURE_SAMPLES
            spoken = np.concatenate(_pad([self.frames[i][:length] for i in picked], length))
            return (
                windows,
                frames,
                np.arange(self.windows, dtype=np.int32),
                " ".join(self.texts[i] for i in picked),
                spoken,
            )
        limit, pieces, texts = self.windows * self.spec.samples, [], []
        i = int(rng.integers(len(self.clips)))
        used = min(
            int(rng.integers(0, 2 * audio.SAMPLE_RATE)) if rng.random() < 0.7 else 0,
            limit - len(self.clips[i]),
        )
        pieces.append(np.zeros(used, np.int16))
        spoken = np.zeros(limit // FEATURE_SAMPLES, np.int32)
        while used + len(self.clips[i]) <= limit:
            gap = int(rng.uniform(0.1, 0.7) * audio.SAMPLE_RATE)
            pieces += [self.clips[i], np.zeros(gap, np.int16)]
            texts.append(self.texts[i])
            first = used // FEATURE_SAMPLES
            spoken[first : first + len(self.frames[i])] = self.frames[i][: len(spoken) - first]
            used += len(self.clips[i]) + gap
            i = int(rng.integers(len(self.clips)))
        stream = np.concatenate(pieces)[:limit]
        if self.spec.count(len(stream)) < self.windows:
            stream = np.pad(
                stream,
                (0, (self.windows - 1) * self.spec.samples + audio.SAMPLE_RATE - len(stream)),
            )
        windows, frames = self.spec.cut(stream)
        return windows, frames, np.zeros(self.windows, np.int32), " ".join(texts), spoken


def _pad(labels: Sequence[Sequence[int]], length: int) -> np.ndarray:
    out = np.zeros((len(labels), length), np.int32)
    for row, label in enumerate(labels):
        out[row, : len(label)] = label
    return out


@dataclasses.dataclass
class Clips:
    """Utterances of a corpus: samples, texts, and the word of every feature (50 Hz, 0: none)."""

    samples: list[np.ndarray]
    texts: list[str]
    frames: list[np.ndarray]


def _frames(item: synthetic.Item, words: dict[str, int]) -> np.ndarray:
    times = synthetic.word_times(item)
    spoken = np.zeros(int(np.ceil(times[-1][2] * audio.SAMPLE_RATE / FEATURE_SAMPLES)), np.int32)
    for word, start, end in times:
        first, last = (int(second * audio.SAMPLE_RATE / FEATURE_SAMPLES) for second in (start, end))
        spoken[first:last] = words.get(word, 0)
    return spoken


def read_clips(
    corpus: pathlib.Path, split: str, words: dict[str, int], limit: int | None = None
) -> Clips:
    """A split's ASR utterances, in train also notes and questions; when each word is spoken is asked of the synthesiser again."""
    manifests = [
        corpus / f"{split}.jsonl",
        *([corpus / synthetic.TRANSCRIPTS] if split == "train" else []),
    ]
    lines = [
        json.loads(line) for manifest in manifests for line in manifest.read_text().splitlines()
    ]
    lines = [line for line in lines if line["task"] == "asr"][:limit]
    samples = [
        audio.read_audio(corpus / line["audio_filepath"])
        for line in tqdm(lines, desc=f"read {split}", mininterval=5)
    ]
    settings = json.loads((corpus / "settings.json").read_text())
    augmentation = synthetic.Augmentation(**settings["train" if split == "train" else "evaluation"])
    names = [line["recording"].split("-") for line in lines]  # set, task, index of the audio
    items = [
        synthetic.Item(settings["seed"], name, task, int(index), augmentation)
        for name, task, index in names
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        spoken = pool.imap(functools.partial(_frames, words=words), items, chunksize=64)
        frames = list(tqdm(spoken, desc=f"word times of {split}", total=len(items), mininterval=5))
    return Clips(samples, [line["text"] for line in lines], frames)


def train_encoder(
    out: pathlib.Path, corpus: pathlib.Path, steps: int, seed: int, init: str = ""
) -> dict:
    """Trains the encoder in the folder `out`, from nothing or from the folder `init`. Returns its figures."""
    config, history = WHISPER_CONFIG, {}
    encoder = pretrained.whisper_from_config(config)
    vocabulary = {word: i + 1 for i, word in enumerate(sentences.lexicon())}
    heads = Heads(len(vocabulary))
    spec = audio.WindowSpec(2 * encoder.max_positions)
    clips = read_clips(corpus, "train", vocabulary)
    batches = StreamBatches(clips.samples, clips.texts, clips.frames, vocabulary, spec)
    features = jnp.zeros((2, encoder.max_positions, encoder.width))
    params = {
        "encoder": encoder.init(
            jax.random.key(seed), jnp.zeros((1, spec.frames, encoder.num_mels))
        )["params"],
        "heads": heads.init(jax.random.key(seed + 1), features, 1)["params"],
    }
    if init:
        history = {"went_on_from": json.loads((pathlib.Path(init) / "TRAINING.json").read_text())}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params["encoder"]
        )
        params["encoder"] = pretrained.load_whisper(pathlib.Path(init), abstract)
    positions = params["encoder"].pop("positions")

    def forward(params, windows, frames, recordings):
        mel = log_mel.log_mel(windows, frames, recordings, encoder.num_mels)
        mel = mel.reshape(-1, *mel.shape[2:])
        features = encoder.apply({"params": {**params["encoder"], "positions": positions}}, mel)
        return heads.apply({"params": params["heads"]}, features, len(windows))

    def loss_fn(params, windows, frames, recordings, characters, words, spoken):
        *ctc, by_frame = forward(params, windows, frames, recordings)
        total = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(by_frame, spoken))
        for logits, labels in zip(ctc, (characters, words), strict=True):
            losses = optax.ctc_loss(
                logits, jnp.zeros(logits.shape[:2]), labels, (labels == 0).astype(jnp.float32)
            )
            total += jnp.mean(losses / jnp.maximum(1, jnp.sum(labels > 0, axis=1)))
        return total

    dev = read_clips(corpus, "dev", vocabulary)
    forward = jax.jit(forward)
    learning_rate = optim.schedule("linear", 1e-2 if init else 2e-2, steps, 200)
    optimizer = optim.make_optimizer(
        "muon", learning_rate, adam_learning_rate_ratio=0.4, weight_decay=0.01
    )
    leaves, minutes = train(
        "encoder", out / "training", steps, flatten_dict(params, sep="/"), loss_fn, optimizer,
        lambda step: batches.draw(np.random.default_rng((seed, step))),
        lambda params: error_rates(forward, params, spec, dev, vocabulary, 64),
    )  # fmt: skip
    params = unflatten_dict(leaves, sep="/")
    figures = {
        "steps": steps,
        "minutes": minutes,
        "parameters": optim.count(flatten_dict(params["encoder"])),
        **history,
    }
    figures |= error_rates(forward, params, spec, dev, vocabulary)
    tensors = dict(
        engine.store({**params["encoder"], "positions": positions}, layouts.hf_whisper())
    )
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    write_folder(out, "encoder", config, tensors, figures)
    return figures


def error_rates(
    forward, params, spec, clips: Clips, vocabulary, limit: int | None = None
) -> dict[str, float]:
    """On single utterances, in percent: character error rate of one CTC head, word error rate of the other (both greedy), and
    features whose word is told wrong.
    """
    inverse = {i: word for word, i in vocabulary.items()}
    spoken, right, count = {"characters": [], "words": []}, 0, 0
    for start in range(0, len(clips.texts[:limit]) - 15, 16):
        cut = [spec.cut(clip) for clip in clips.samples[start : start + 16]]
        windows, frames = np.stack([c[0] for c in cut]), np.stack([c[1] for c in cut])
        *ctc, by_frame = forward(params, windows, frames, np.zeros(frames.shape, np.int32))
        labels = _pad(clips.frames[start : start + 16], by_frame.shape[1])
        right, count = (
            right + np.sum((np.argmax(by_frame, -1) == labels) & (labels > 0)),
            count + np.sum(labels > 0),
        )
        for name, logits in zip(spoken, ctc, strict=True):
            for path in np.argmax(logits, -1):
                ids = [
                    int(i)
                    for i, before in zip(path, [0, *path[:-1]], strict=True)
                    if i and i != before
                ]
                text = (
                    "".join(CHARACTERS[i - 1] for i in ids)
                    if name == "characters"
                    else " ".join(inverse[i] for i in ids)
                )
                spoken[name].append(text)
    texts = clips.texts[: len(spoken["words"])]
    return {
        "dev_cer": round(100 * jiwer.cer(texts, spoken["characters"]), 2),
        "dev_wer": round(100 * jiwer.wer(texts, spoken["words"]), 2),
        "dev_frame_error": round(100 * float(1 - right / count), 2),
    }


# ------------------------------------------------------------------------------------------------------------- writing


def write_folder(
    out: pathlib.Path, part: str, config: dict, tensors: dict[str, np.ndarray], figures: dict
) -> None:
    """config.json, model.safetensors, and TRAINING.json: the command, seed, time and figures that made them."""
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(
        json.dumps(config | {"torch_dtype": "bfloat16"}, indent=1) + "\n"
    )
    command = f"python -m fastslm_jax.demo.train_bases --seed={FLAGS.seed} --utterances={FLAGS.utterances}"
    command += f" --encoder_steps={FLAGS.encoder_steps} --llm_steps={FLAGS.llm_steps}"
    command += f" --part={part} --corpus={FLAGS.corpus} --out={FLAGS.out}"
    for flag in ("encoder_init", "llm_init"):
        command += f" --{flag}={FLAGS[flag].value}" if FLAGS[flag].value else ""
    (out / "TRAINING.json").write_text(
        json.dumps({"command": command, "seed": FLAGS.seed} | figures, indent=1) + "\n"
    )


def main(_):
    out = pathlib.Path(FLAGS.out)
    for part, name in (("llm", "demo_llm"), ("encoder", "demo_whisper")):
        if FLAGS.part not in ("all", part):
            continue
        unfinished = out / f"{name}.unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        if part == "llm":
            figures = train_llm(unfinished, FLAGS.llm_steps, FLAGS.seed, FLAGS.llm_init)
        else:
            counts = {
                key: dict.fromkeys(tasks, 0) for key, tasks in synthetic.DEFAULT_COUNTS.items()
            }
            counts["train"] |= {
                "asr": FLAGS.utterances,
                "ssum": FLAGS.utterances // 6,
                "sqqa": FLAGS.utterances // 4,
            }
            counts["dev"]["asr"] = 200
            synthetic.build_corpus(FLAGS.corpus, FLAGS.seed + 1000, counts, os.cpu_count())
            figures = train_encoder(
                unfinished,
                pathlib.Path(FLAGS.corpus),
                FLAGS.encoder_steps,
                FLAGS.seed,
                FLAGS.encoder_init,
            )
        shutil.rmtree(unfinished / "training")
        shutil.rmtree(out / name, ignore_errors=True)
        unfinished.rename(out / name)
        print(f"{out / name}: {json.dumps(figures)}")


if __name__ == "__main__":
    cli.run(main)
