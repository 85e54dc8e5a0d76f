"""FLOPs and memory of adapter and decoder against the length of a recording, by token rate."""

import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax import flops, memory
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.data.packing import RowShape
from fastslm_jax.models.adapters import Adapter, Stack
from fastslm_jax.models.fastslm import FastSLM

TOKEN_RATES = (50 / 30, 12.5, 25, 50)  # per second: HFQ-Former, and stacks of 4, 2 and 1 frames
MINUTES = (0.5, 5, 10, 30, 60)


def shapes_of(adapter: Adapter, features: jax.ShapeDtypeStruct) -> dict:
    """Shapes of an adapter's parameters, as `adapter.apply` takes them."""
    return {"params": jax.eval_shape(adapter.init, jax.random.key(0), features)["params"]}


def adapter_of(model: FastSLM, rate: float) -> Adapter:
    """The model's HFQ-Former for its own rate, otherwise a stack of frames and an MLP."""
    tokens = round(rate * model.window.seconds)
    if tokens == model.tokens_per_window:
        return model.adapter
    return Stack(output_width=model.llm.width, compression_size=tokens, dtype=model.adapter.dtype)


def adapter_costs(model: FastSLM, rate: float, minutes: float) -> dict[str, float]:
    """FLOPs per window of an adapter, its parameters, and the memory of its compiled program.

    The memory is XLA's plan for a CPU: temporary arrays and the tokens of `minutes` of audio.
    """
    adapter = adapter_of(model, rate)
    windows = model.window.count(round(60 * minutes * SAMPLE_RATE))

    def features(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (count, model.encoder.max_positions, model.encoder.width), jnp.bfloat16
        )

    params = shapes_of(adapter, features(1))
    plan = jax.jit(adapter.apply).lower(params, features(windows)).compile().memory_analysis()
    return {
        "rate": round(rate, 2),
        "adapter": type(adapter).__name__,
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)),
        "window_flops": flops.executed(jax.jit(adapter.apply).trace(params, features(1))),
        "memory_gib": (plan.temp_size_in_bytes + plan.output_size_in_bytes) / memory.GIB,
    }


def decoder_costs(model: FastSLM, rate: float, minutes: float) -> dict[str, float]:
    """FLOPs of reading the speech tokens, and bytes of their key-value cache in bfloat16.

    The terms of `flops.minimum` are those of training: a forward pass is a half of the frozen
    projections and a third of LoRA and of attention.
    """
    tokens = round(rate * 60 * minutes)
    terms = flops.minimum(model, RowShape(windows=1, tokens=tokens, labels=1))
    llm = model.llm
    cache = memory.kv_cache_bytes(
        layers=llm.num_layers,
        rows=1,
        length=tokens,
        kv_heads=llm.num_kv_heads,
        head_dim=llm.head_dim,
        dtype=jnp.bfloat16,
    )
    parts = {"decoder projections": 2, "decoder LoRA": 3, "decoder attention": 3}
    return {
        "minutes": minutes,
        "tokens": tokens,
        "flops": sum(terms[name] / divisor for name, divisor in parts.items()),
        "cache_gib": cache / memory.GIB,
    }


def costs(model: FastSLM) -> list[dict]:
    """Costs of the adapter and the decoder for each token rate."""
    found = []
    for rate in TOKEN_RATES:
        adapter = adapter_costs(model, rate, minutes=10)
        for minutes in MINUTES:
            windows = model.window.count(round(60 * minutes * SAMPLE_RATE))
            adapter_flops = windows * adapter["window_flops"]
            decoder = decoder_costs(model, rate, minutes)
            found.append(adapter | decoder | {"adapter_flops": adapter_flops})
    return found
