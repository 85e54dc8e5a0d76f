"""Trains the demo's tokenizer and small Qwen3-shaped language model on synthetic text.

    python -m fastslm_jax.demo.train_llm --out=assets [--seed=0]

The model learns plain sentences in English and Korean, and all tasks in chat form with text in
place of speech; see `text_rows`. The result, OUT/demo_llm, is a Hugging Face folder. Interrupt at
any time; rerunning resumes.
"""

import json
import pathlib
import random
import shutil
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastslm_jax import cli
from fastslm_jax.data import prompts
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import examples, model_folder, text_rows, training_loop
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.training import optim
from fastslm_jax.weights import engine, layouts, pretrained

CONFIG = {
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
DEV_LENGTH = 192  # tokens of a row in `exact_match`

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("out", "assets", "Output folder; the model is OUT/demo_llm.")
    flags.DEFINE_integer("seed", 0, "Seed of the parameters and the training text.")
    flags.DEFINE_integer("llm_steps", 4000, "Optimizer steps.")
    flags.DEFINE_string(
        "llm_init",
        "",
        "Folder of a language model to start from, at half the learning rate "
        "(default: random parameters).",
    )


def train_tokenizer(folder: pathlib.Path, vocab_size: int, seed: int) -> None:
    """A byte-level BPE with Qwen's chat markers, saved as a Hugging Face tokenizer folder."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    instructions = [
        *text_rows.TEXT_INSTRUCTIONS.values(),
        *text_rows.SPEECH_INSTRUCTIONS.values(),
    ]
    texts = instructions * 50
    for example in examples.text_examples("train", seed, 40_000):
        # With a leading space too: words at the start of a text get the tokens of words inside it.
        texts += [example.text, " " + example.text, example.answer]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def input_embeddings(
    model: Decoder, params: dict, noise: jax.Array, ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """Inputs [batch, length, width] from the fields of `text_rows.TextExample`."""
    words = model.apply({"params": params}, ids, method="embed")
    embeddings = jnp.einsum("blkd,blk->bld", words, weights)
    rms = jnp.sqrt(jnp.mean(jnp.square(params["embed_tokens"])))
    key = jax.random.key(jnp.sum(ids))
    return embeddings + rms * noise[:, :, None] * jax.random.normal(key, embeddings.shape)


def exact_match(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, count: int
) -> Callable[[dict], dict[str, float]]:
    """Builds parameters -> fraction of dev examples with every answer token right (teacher-forced).

    There is one score for each task, and one for each task with blurred text.
    """

    @jax.jit
    def predict(params: dict, *inputs: jax.Array) -> jax.Array:
        embeddings = input_embeddings(model, params, *inputs)
        positions = jnp.broadcast_to(jnp.arange(DEV_LENGTH), embeddings.shape[:2])
        hidden, _ = model.apply({"params": params}, embeddings, positions)
        return jnp.argmax(model.apply({"params": params}, hidden, method="logits"), -1)

    batches = {}
    for is_blurred in (False, True):
        rng = random.Random("text accuracy")
        for task in TASKS:
            rows = []
            for _ in range(count):
                drawn = examples.draw_example(task, rng, "dev")
                text = text_rows.chat_example(
                    tokenizer,
                    drawn.text,
                    text_rows.TEXT_INSTRUCTIONS[task],
                    drawn.answer,
                    rng if is_blurred else None,
                )
                rows.append(text_rows.pad(text, DEV_LENGTH))
            batches[f"{task}_blurred" if is_blurred else task] = text_rows.stack(rows)

    def scores(params: dict) -> dict[str, float]:
        results = {}
        for name, (tokens, loss, *inputs) in batches.items():
            is_right = np.asarray(predict(params, *inputs))[:, :-1] == tokens[:, 1:]
            is_answer = loss[:, 1:] >= 1
            results[name] = float((is_right | ~is_answer).all(axis=1).mean())
        return results

    return scores


def train_llm(
    folder: pathlib.Path, steps: int, seed: int, init: str = ""
) -> tuple[dict, dict[str, object]]:
    """Trains the language model, and unless `init` has one, its tokenizer.

    Args:
        folder: where the tokenizer and the checkpoints are saved.
        steps: optimizer steps.
        seed: seed of the parameters and the training text.
        init: folder of a language model to start from; "": random parameters.

    Returns:
        the parameters, and figures of the training.
    """
    model, history = pretrained.decoder_from_config(CONFIG), {}
    params = model.init(
        jax.random.key(seed), jnp.zeros((1, 2, model.width)), jnp.zeros((1, 2), jnp.int32)
    )["params"]
    if init:
        history = model_folder.earlier_training(init)
        params = pretrained.load_decoder(init, params)
        for file in pathlib.Path(init).glob("*token*"):
            shutil.copy(file, folder)
        shutil.copy(pathlib.Path(init) / "chat_template.jinja", folder)
    elif not (folder / "tokenizer.json").exists():
        train_tokenizer(folder, CONFIG["vocab_size"] - 64, seed)
    tokenizer = prompts.load_tokenizer(folder, CONFIG["vocab_size"])

    def loss_fn(
        params: dict,
        segments: jax.Array,
        positions: jax.Array,
        tokens: jax.Array,
        loss: jax.Array,
        *inputs: jax.Array,
    ) -> jax.Array:
        embeddings = input_embeddings(model, params, *inputs)
        hidden, _ = model.apply({"params": params}, embeddings, positions, segments)
        logits = model.apply({"params": params}, hidden[:, :-1], method="logits")
        loss = jnp.where(positions[:, 1:] > 0, loss[:, 1:], 0)  # not the first token of a text
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(each * loss) / jnp.sum(loss)

    def batch_of(step: int) -> tuple[np.ndarray, ...]:
        if step % 2 == 0:  # long rows, for transcripts of three minutes
            return text_rows.text_rows(tokenizer, seed, step, 1344, 2, max_sentences=46)
        return text_rows.text_rows(tokenizer, seed, step, 160, 12)

    learning_rate = optim.schedule("linear", 5e-3 if init else 1e-2, steps, 100)
    optimizer = optim.make_optimizer(
        "muon", learning_rate, adam_learning_rate_ratio=0.3, weight_decay=0.01
    )
    scores = exact_match(model, tokenizer, 100)
    leaves, minutes = training_loop.train(
        "llm",
        folder / model_folder.CHECKPOINTS,
        steps,
        flatten_dict(params, sep="/"),
        loss_fn,
        optimizer,
        batch_of,
        scores,
    )
    params = unflatten_dict(leaves, sep="/")
    figures = {"steps": steps, "minutes": minutes, "parameters": optim.count(leaves), **history}
    return params, figures | {"dev_exact_match": scores(params)}


def main(_: Sequence[str]) -> None:
    unfinished = model_folder.create_unfinished(pathlib.Path(FLAGS.out), "demo_llm")
    params, figures = train_llm(unfinished, FLAGS.llm_steps, FLAGS.seed, FLAGS.llm_init)
    command = model_folder.command_line("train_llm", ("seed", "llm_steps", "out", "llm_init"))
    training = {"command": command, "seed": FLAGS.seed, **figures}
    tensors = engine.store(params, layouts.hf_decoder())
    model_folder.write(unfinished, CONFIG, tensors, training)
    print(f"{model_folder.publish(unfinished)}: {json.dumps(figures)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
