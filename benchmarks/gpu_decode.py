"""What decoding with FastSLM-4B moves per token on one GPU, against its weights and its cache.

    python benchmarks/gpu_decode.py [--topology=h100:1] [--batches=1,16,64] [--length=2048]
        [--cache_dtype=bfloat16]

XLA's GPU compiler compiles one decoding step (pip install -e .[plan-gpu]); nothing runs. Every step
reads the weights of the decoder once and the filled part of the cache, here all of it. "Moved" adds
up what the instructions of the compiled step read and write. Target: at batch 1, at most 1.15 times
weights and cache. Last line: one JSON object.
"""

import dataclasses
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from banner import print_banner
from full_size_model import bytes_of, full_size
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from fastslm_jax import chips, cli
from fastslm_jax.inference import programs
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.kv_cache import block_size
from fastslm_jax.plan import hlo, traffic

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", "h100:1", "The GPU to compile for.")
flags.DEFINE_list("batches", ["1", "16", "64"], "Batch sizes.")
flags.DEFINE_integer("length", 2048, "Positions of the cache, all of them filled.")
flags.DEFINE_string("cache_dtype", "bfloat16", "Of the key-value cache.")


def compile_decode(
    model: FastSLM, device: jax.Device, batch: int, length: int, dtype: DTypeLike
) -> tuple[hlo.Program, dict, object]:
    """The compiled program, and the shapes of the decoder's parameters and of the cache."""
    placed = SingleDeviceSharding(device)

    def array(leaf: jax.ShapeDtypeStruct, dtype: DTypeLike | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype or leaf.dtype, sharding=placed)

    def stored(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_ours = path[0].key == "hfq_former" or path[-1].key.startswith("lora_")
        return array(leaf, jnp.float32 if is_ours else jnp.bfloat16)

    params = jax.tree_util.tree_map_with_path(stored, jax.eval_shape(model.init, jax.random.key(0)))
    model = dataclasses.replace(model, llm=model.llm.clone(scan_layers=False))
    params = jax.tree.map(array, jax.eval_shape(programs.separate_layers, params))
    cache = jax.tree.map(
        array, jax.eval_shape(lambda: model.llm.init_cache(batch, length, jnp.dtype(dtype)))
    )
    rows = jax.tree.map(array, programs.DecodeState.idle(batch))
    controls = SamplingParams().controls()
    lowered = programs.decode.lower(
        model, params, cache, rows, None, controls, 0, 64, batch, True, greedy=True, mesh=None
    )
    return hlo.Program(lowered.compile().as_text()), params["llm"], cache


def moved_per_step(program: hlo.Program, length: int) -> float:
    """Bytes of one iteration of the decode loop, with every block of the cache filled."""
    loops = [i for i in program.computations[program.entry] if i.opcode == "while"]
    blocks = length // block_size(length)
    return max(
        sum(entry.total for entry in traffic.by_instruction(program.body(loop), blocks))
        for loop in loops
    )


def measure(topology: chips.GPUTopology, batch: int) -> dict:
    started = time.time()
    device = topology.devices()[0]
    program, llm, cache = compile_decode(
        full_size(device), device, batch, FLAGS.length, FLAGS.cache_dtype
    )
    least = bytes_of(llm) + bytes_of(cache)
    moved = moved_per_step(program, FLAGS.length)
    return {
        "batch": batch,
        "length": FLAGS.length,
        "weights_gb": bytes_of(llm) / 1e9,
        "cache_gb": bytes_of(cache) / 1e9,
        "moved_gb": moved / 1e9,
        "ratio": moved / least,
        "tokens_per_second_bound": batch * topology.chip.hbm_bandwidth / moved,
        "compile_seconds": time.time() - started,
    }


def main(_: list[str]) -> None:
    print_banner("Bytes per decoding step against weights and cache, by XLA's compiler.", "cpu")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    topology = chips.parse_topology(FLAGS.topology)
    results = []
    for batch in map(int, FLAGS.batches):
        r = measure(topology, batch)
        results.append(r)
        print(
            f"batch {batch:>3}: weights {r['weights_gb']:.2f} + cache {r['cache_gb']:.2f} GB, "
            f"moved {r['moved_gb']:.2f} GB ({r['ratio']:.2f} times), at most "
            f"{r['tokens_per_second_bound']:,.0f} tokens/s, compiled in "
            f"{r['compile_seconds']:.0f} s",
            flush=True,
        )
    print(json.dumps({"topology": FLAGS.topology, "decode": results}))


if __name__ == "__main__":
    cli.run(main)
