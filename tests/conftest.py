"""Shared fixtures: eight virtual CPU devices, a tiny tokenizer, model, batch, and corpus."""

import collections
import os

import fast_compilation

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        fast_compilation.FLAGS,
    ]
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax.data import packing, prompts
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.demo import corpus as synthetic
from fastslm_jax.demo import examples
from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.layers import sinusoids
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.whisper import WhisperEncoder

VOCAB_ROWS = 320  # embedding rows: 300 tokens, nine added tokens, and some unused rows


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE of 300 tokens with Qwen's chat markers and a chat template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [example.text for example in examples.text_examples("train", 0, 100)]
    tokenizer.train_from_iterator([*texts, "user\n", "assistant\n"] * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_tokenizer(tokenizer_folder) -> prompts.PromptTokenizer:
    return prompts.PromptTokenizer(prompts.load_tokenizer(tokenizer_folder, VOCAB_ROWS))


@pytest.fixture(scope="session")
def model() -> FastSLM:
    """Windows of 1 s, 3 speech tokens each; encoder width 64, decoder width 32, LoRA of rank 4."""
    encoder = WhisperEncoder(
        width=64, num_layers=2, num_heads=2, mlp_dim=128, num_mels=16, max_positions=50
    )
    hfq_former = HFQFormer(
        output_width=32, stage_tokens=(4, 4, 4), compression_size=3, detail_recovery_layers=1
    )
    llm = Decoder(
        vocab_size=VOCAB_ROWS,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=64,
        lora=LoRA(rank=4, alpha=8.0),
    )
    return FastSLM(encoder, hfq_former, llm)


@pytest.fixture(scope="session")
def params(model) -> dict:
    """Random parameters of `model`, including LoRA B, biases, and norm scales."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path.endswith("positions"):
            return sinusoids(*leaf.shape)
        if path.endswith("/kernel"):
            return rng.normal(0, leaf.shape[-2] ** -0.5, leaf.shape)
        return rng.normal(1.0 if path.endswith("/scale") else 0.0, 0.1, leaf.shape)

    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    return unflatten_dict(
        {path: jnp.asarray(draw(path, leaf), jnp.float32) for path, leaf in leaves.items()}, sep="/"
    )


@pytest.fixture(scope="session")
def row_shape() -> packing.RowShape:
    return packing.RowShape(windows=4, tokens=128, labels=48)


@pytest.fixture(scope="session")
def make_part(prompt_tokenizer, model):
    """make_part(seconds, answer, seed) → (ids, samples): one example for `packing.assemble`."""

    def make(seconds: float, answer: str, seed: int = 0, task: str = "asr"):
        samples = (
            np.random.default_rng(seed).normal(0, 3000, round(16_000 * seconds)).astype(np.int16)
        )
        num_speech = model.window.count(len(samples)) * model.tokens_per_window
        return prompt_tokenizer.encode(task, "write", answer, num_speech), samples

    return make


@pytest.fixture(scope="session")
def batch(make_part, row_shape, model) -> dict[str, np.ndarray]:
    """Eight rows of two examples each, 0.8 to 2.4 s long, with answers of different lengths."""
    words = "anna bought two red lamps in vienna on friday".split()
    rows = []
    for number in range(8):
        parts = [
            make_part(1.0 + 0.2 * number, " ".join(words[: 1 + number]), seed=number),
            make_part(0.8, words[number], seed=100 + number),
        ]
        rows.append(packing.assemble(parts, row_shape, model.window, model.tokens_per_window))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with train.jsonl and dev.jsonl: espeak-ng clips of all four tasks."""
    pytest.importorskip("espeakng_loader")
    out = tmp_path_factory.mktemp("corpus")
    counts = {
        "train": {"asr": 6, "ast": 2, "ssum": 1, "sqqa": 2},
        "dev": {"asr": 2, "ast": 1, "ssum": 1, "sqqa": 1},
        "test": dict.fromkeys(TASKS, 0),
        "test_unseen_voices": {"asr": 0},
        "test_long": {"asr": 0},
    }
    synthetic.build_corpus(out, seed=1, counts=counts, workers=1)
    return out


# ------------------------------------------------------------------------------- files of test_fuzz

_tried = collections.Counter()  # {kind: files}, over all processes


def pytest_sessionfinish(session) -> None:
    """Sends this worker's counts to the main process, or counts them here."""
    tried = getattr(session.config, "tried", {})  # set by test_fuzz
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = tried
    else:
        _tried.update(tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    _tried.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    if _tried:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(_tried.items()))
        terminalreporter.write_line(f"{sum(_tried.values())} mutated files tried: {kinds}")
