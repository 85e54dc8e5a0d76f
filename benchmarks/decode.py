"""Tokens per second of generation against PyTorch's `generate` with the same weights, threads and precision.

    python benchmarks/decode.py [--sizes=demo,middle] [--batches=1,16] [--new_tokens=128] [--rounds=8]

Two random Qwen3 in float32: the demo's (width 192, 4 layers) and a middle one (width 1 024, 8 layers). Prompts of 32 ids, no end
token. Both sides run greedy on the cores that this process may use; the rounds take turns, the fastest of each counts, and
compilation is given apart. To compare: at least 3 times as fast at the demo's size, 1.2 times at the middle one.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import json
import time
import types

import jax
import numpy as np
from absl import app, flags
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import devices
from fastslm_jax.inference.batching import CHUNK, Prompt
from fastslm_jax.inference.generator import Generator, bucketed_length
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.hfq_former import HFQFormer
from fastslm_jax.models.qwen3 import Qwen3
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.weights import engine, layouts

SIZES = {  # rows, width, layers, heads, key-value heads, head dimension, MLP
    "demo": (1536, 192, 4, 4, 2, 64, 576),
    "middle": (32_000, 1024, 8, 16, 8, 64, 3072),
}
PROMPT = 32
FLAGS = flags.FLAGS
flags.DEFINE_list("sizes", list(SIZES), "Which models.")
flags.DEFINE_list("batches", ["1", "16"], "Batch sizes.")
flags.DEFINE_integer("new_tokens", 128, "Tokens of each answer.")
flags.DEFINE_integer("rounds", 8, "Rounds of each side.")


def build(size: str) -> tuple[FastSLM, dict, object]:
    """Our model and parameters, and `transformers`' with the same weights. The speech side is a stub of no work here."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rows, width, layers, heads, kv_heads, head_dim, mlp = SIZES[size]
    llm = Qwen3(rows, width, layers, heads, kv_heads, head_dim, mlp)
    model = FastSLM(WhisperEncoder(64, 1, 1, 64, 80, 50), HFQFormer(width, (2, 2), 2), llm)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0))["llm"], sep="/")
    rng = np.random.default_rng(0)
    weights = {
        path: (
            np.ones(leaf.shape) if path.endswith("scale") else rng.normal(0, 0.05, leaf.shape)
        ).astype(np.float32)
        for path, leaf in shapes.items()
    }
    config = Qwen3Config(
        vocab_size=rows, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope.theta},
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(config).eval()
    state = {
        tensor.key: torch.from_numpy(np.array(tensor.read()))
        for tensor in engine.tensors(weights, layouts.hf_qwen3())
    }
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    return (
        model,
        {
            "llm": unflatten_dict(
                {path: jax.numpy.asarray(leaf) for path, leaf in weights.items()}, sep="/"
            )
        },
        theirs,
    )


def main(_):
    import torch

    threads = devices.cores()
    torch.set_num_threads(threads)
    results = []
    for size in FLAGS.sizes:
        model, params, theirs = build(size)
        generator = Generator(
            model, params, types.SimpleNamespace(end_id=-1), detect_repetition=False
        )
        for batch in map(int, FLAGS.batches):
            ids = (
                np.random.default_rng(1)
                .integers(0, model.llm.vocab_size, (batch, PROMPT))
                .astype(np.int32)
            )
            slots = bucketed_length(PROMPT + max(FLAGS.new_tokens, CHUNK))

            def ours(generator=generator, ids=ids, batch=batch, slots=slots):
                prompts = ((0.0, Prompt(row, None, -1, FLAGS.new_tokens)) for row in ids)
                found = {
                    number: tokens
                    for number, tokens, *_ in generator.run(prompts, rows=batch, slots=slots)
                }
                return np.array([found[number] for number in range(batch)])

            def pytorch(theirs=theirs, ids=ids):
                inputs = torch.from_numpy(ids.astype(np.int64))
                options = {
                    "do_sample": False,
                    "eos_token_id": None,
                    "pad_token_id": 0,
                    "max_new_tokens": FLAGS.new_tokens,
                }
                with torch.no_grad():
                    return theirs.generate(
                        inputs, attention_mask=torch.ones_like(inputs), **options
                    )[:, PROMPT:].numpy()

            before = devices.compiled_so_far()
            tokens = ours()
            compiling = (devices.compiled_so_far() - before).seconds
            equal = float(np.mean(tokens == pytorch()))
            seconds = {"ours": [], "pytorch": []}
            for _ in range(FLAGS.rounds):
                for name, run in (("ours", ours), ("pytorch", pytorch)):
                    time.sleep(0.5)  # the other side's threads spin on after their work
                    started = time.time()
                    run()
                    seconds[name].append(time.time() - started)
            speed = {
                name: batch * FLAGS.new_tokens / min(values) for name, values in seconds.items()
            }
            results.append(
                {
                    "size": size,
                    "batch": batch,
                    "tokens_per_second": round(speed["ours"], 1),
                    "pytorch_tokens_per_second": round(speed["pytorch"], 1),
                    "ratio": round(speed["ours"] / speed["pytorch"], 2),
                    "compile_seconds": round(compiling, 1),
                    "equal_tokens": round(equal, 4),
                    "threads": threads,
                }
            )
            last = results[-1]
            print(
                f"{size:>7} batch {batch:>3}: {last['tokens_per_second']:>9.1f} tokens/s, PyTorch "
                f"{last['pytorch_tokens_per_second']:>9.1f}, ratio {last['ratio']:.2f}; compiled in {compiling:.1f} s; "
                f"{100 * equal:.1f} % of tokens equal",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    app.run(main)
