"""Tokens per second of generation, against PyTorch's `generate` with the same weights and threads.

    python benchmarks/decode.py [--sizes=demo,middle] [--batches=1,16] [--new_tokens=128]
        [--rounds=8]

Two random Qwen3 models in float32: the demo's size (width 192, 4 layers) and `middle` (width 1024,
8 layers). Prompts have 32 tokens, and no token ends an answer. Both sides decode greedily on
all cores that this process may use. Rounds alternate and the fastest of each side counts;
compilation is reported separately. Last line: one JSON list.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import json
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from banner import print_banner
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import devices
from fastslm_jax.inference.batching import ContinuousBatch, Prompt
from fastslm_jax.inference.capacity import PREFILL_CHUNK, bucketed_length
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.weights import engine, layouts

try:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
except ImportError:
    print("error: PyTorch is needed: pip install -e .[export]", file=sys.stderr)
    sys.exit(2)

SIZES = {  # vocabulary, width, layers, heads, key-value heads, head dimension, MLP
    "demo": (1536, 192, 4, 4, 2, 64, 576),
    "middle": (32_000, 1024, 8, 16, 8, 64, 3072),
}
PROMPT = 32
FLAGS = flags.FLAGS
flags.DEFINE_list("sizes", list(SIZES), "Model sizes.")
flags.DEFINE_list("batches", ["1", "16"], "Batch sizes.")
flags.DEFINE_integer("new_tokens", 128, "Tokens of each answer.")
flags.DEFINE_integer("rounds", 8, "Rounds of each side.")


def build(size: str) -> tuple[FastSLM, dict, Qwen3ForCausalLM]:
    """Our model, its parameters, and the model of `transformers` with the same weights.

    The speech encoder and the HFQ-Former are stubs; prompts have no audio.
    """
    vocab, width, layers, heads, kv_heads, head_dim, mlp = SIZES[size]
    llm = Decoder(vocab, width, layers, heads, kv_heads, head_dim, mlp, scan_layers=False)
    model = FastSLM(
        WhisperEncoder(64, 1, 1, 64, 80, 50), HFQFormer(width, 2, stage_tokens=(2, 2)), llm
    )
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0))["llm"], sep="/")
    rng, weights = np.random.default_rng(0), {}
    for path, leaf in shapes.items():
        is_scale = path.endswith("scale")
        draw = np.ones(leaf.shape) if is_scale else rng.normal(0, 0.05, leaf.shape)
        weights[path] = draw.astype(np.float32)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope.theta},
    )
    reference = Qwen3ForCausalLM(config).eval()
    tensors = engine.tensors(weights, layouts.hf_decoder())
    state = {tensor.key: torch.from_numpy(np.array(tensor.read())) for tensor in tensors}
    reference.load_state_dict(state, strict=False)
    reference.tie_weights()
    return (
        model,
        {"llm": unflatten_dict(jax.tree.map(jax.numpy.asarray, weights), sep="/")},
        reference,
    )


def generate(model: FastSLM, params: dict, ids: np.ndarray) -> np.ndarray:
    """New tokens [batch, new_tokens] after the prompts ids [batch, PROMPT]."""
    batch = ContinuousBatch(
        model,
        params,
        rows=len(ids),
        cache_length=bucketed_length(PROMPT + max(FLAGS.new_tokens, PREFILL_CHUNK)),
        cache_dtype=np.dtype(np.float32),
        sampling=SamplingParams(),
        end_ids=[],
        detect_repetition=False,
        mesh=None,
    )
    prompts = (Prompt(row, None, -1, FLAGS.new_tokens) for row in ids)
    answers = {running.number: running.tokens for running in batch.run(prompts)}
    return np.array([answers[number] for number in range(len(ids))])


@torch.no_grad()
def generate_pytorch(model: Qwen3ForCausalLM, ids: np.ndarray) -> np.ndarray:
    inputs = torch.from_numpy(ids.astype(np.int64))
    outputs = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=FLAGS.new_tokens,
    )
    return outputs[:, PROMPT:].numpy()


def fastest(ours: Callable[[], object], pytorch: Callable[[], object]) -> tuple[float, float]:
    """Shortest time of each side in seconds, from alternating rounds."""
    seconds = [], []
    for _ in range(FLAGS.rounds):
        for found, run in zip(seconds, (ours, pytorch), strict=True):
            time.sleep(0.5)  # the other side's thread pool keeps spinning for a while
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
    return min(seconds[0]), min(seconds[1])


def compare(
    size: str, batch: int, model: FastSLM, params: dict, reference: Qwen3ForCausalLM
) -> dict:
    vocab = model.llm.vocab_size
    ids = np.random.default_rng(1).integers(0, vocab, (batch, PROMPT)).astype(np.int32)
    ours = functools.partial(generate, model, params, ids)
    pytorch = functools.partial(generate_pytorch, reference, ids)
    before = devices.compiled_so_far()
    tokens = ours()
    compile_seconds = (devices.compiled_so_far() - before).seconds
    equal = float(np.mean(tokens == pytorch()))
    speed, pytorch_speed = (batch * FLAGS.new_tokens / s for s in fastest(ours, pytorch))
    return {
        "size": size,
        "batch": batch,
        "tokens_per_second": round(speed, 1),
        "pytorch_tokens_per_second": round(pytorch_speed, 1),
        "ratio": round(speed / pytorch_speed, 2),
        "compile_seconds": round(compile_seconds, 1),
        "equal_tokens": round(equal, 4),
        "threads": devices.cores(),
    }


def main(_: list[str]) -> None:
    print_banner("Tokens per second of generation against PyTorch, float32.")
    torch.set_num_threads(devices.cores())
    results = []
    for size in FLAGS.sizes:
        model, params, reference = build(size)
        for batch in map(int, FLAGS.batches):
            result = compare(size, batch, model, params, reference)
            results.append(result)
            print(
                f"{size:>7} batch {batch:>3}: {result['tokens_per_second']:>9.1f} tokens/s, "
                f"PyTorch {result['pytorch_tokens_per_second']:>9.1f}, "
                f"ratio {result['ratio']:.2f}; compiled in {result['compile_seconds']:.1f} s; "
                f"{result['equal_tokens']:.1%} of tokens equal",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    app.run(main)
