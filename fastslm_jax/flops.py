"""Floating-point operations of matrix products: those that a traced step executes, and the least that the model needs.

A matrix product [m, k] × [k, n] is 2·m·k·n operations. Elementwise work is not counted, in either number.
docs/performance.md derives the minimum term by term.
"""

import itertools
import json
import math

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from fastslm_jax import audio
from fastslm_jax.data.packing import RowShape
from fastslm_jax.models.fastslm import FastSLM

# Matrix products of splash attention's kernels, each over all visited scores. Forward: QK, PV. Backward, after the scores again:
# dV, dP, dK (dkv) and dP, dQ (dq), or all in one kernel (use_fused_bwd_kernel).
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}


class UncountableError(ValueError):
    """A loop or kernel whose operations cannot be known from its program."""


# ------------------------------------------------------------------------------------------------------------- executed


def executed(traced: jax.stages.Traced) -> int:
    """Operations that a traced function (`jax.jit(f).trace(…)`) executes, on all devices together.

    Scans count by their length, rematerialised parts as often as they run, branches by the costliest. Results that nobody
    reads are not counted, since no compiler computes them.

    Raises:
        UncountableError: a while loop or a kernel with matrix products whose number is not known.
    """
    jaxpr = traced.jaxpr.jaxpr
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(live)


def _count(jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return (
            2
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(left[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel, out_axis = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_axis]
    if name == "pallas_call":
        return _count_kernel(equation)
    inner = [_count(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise UncountableError(
            "a while loop holds matrix products, and how often it runs is not part of the program; use scan"
        )
    if name == "shard_map":  # its body is what one device does
        return sum(inner) * math.prod(
            params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
        )
    return sum(inner)


def _inner_jaxprs(params):
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _count_kernel(equation) -> int:
    """Splash attention by its own formula: products × 2 × visited scores × head dimension, for every head (and batch row).

    Visited scores are those of all blocks that a causal mask does not leave out; blocks are not split at the diagonal.
    """
    params = equation.params
    name = str(params["name"])
    kernel = next(
        (
            kind
            for kind in ("fwd", "dq", "dkv")
            if name.startswith("splash_mha") and f"_{kind}_" in name
        ),
        None,
    )
    if kernel is None:
        raise UncountableError(f"the kernel {name} has no formula; add one to fastslm_jax/flops.py")
    # Operands: two tables of blocks, q, k, v, segment ids of queries and keys, and for a causal mask the queries' positions;
    # backward kernels have three more.
    operands = len(equation.invars) - 2 * ("_segmented" in name) - (0 if kernel == "fwd" else 3)
    is_causal = operands == 6
    *batch, num_heads, length, head_dim = equation.invars[2].aval.shape
    context = equation.invars[3].aval.shape[-2]
    suffix = "" if kernel == "fwd" else f"_{kernel}"
    blocks = json.loads(dict(params["metadata"])["xprof_metadata"])
    scores = visited_scores(
        length, context, blocks[f"block_q{suffix}"], blocks[f"block_kv{suffix}"], is_causal
    )
    if kernel == "dkv" and len(equation.outvars) == 5:
        kernel = "dkv_fused"
    return SPLASH_PRODUCTS[kernel] * 2 * scores * head_dim * num_heads * math.prod(batch)


def visited_scores(length: int, context: int, block_q: int, block_kv: int, is_causal: bool) -> int:
    """Scores that a kernel computes which goes block by block.

    Example: 4 queries and keys in blocks of 2, causal → 12 of 16.
    """
    if not is_causal:
        return length * context
    last_keys = range(block_q - 1, length, block_q)
    return sum(min(context, (last // block_kv + 1) * block_kv) * block_q for last in last_keys)


# -------------------------------------------------------------------------------------------------------------- minimum


def minimum(model: FastSLM, row: RowShape, rows: int = 1) -> dict[str, int]:
    """The least operations of a training step on `rows` full rows, by term; docs/performance.md derives them.

    The Whisper encoder and the decoder's own weights are frozen: the encoder runs forward only, the decoder's weights get no
    gradients. Every slot of a row is taken: one recording over all windows and tokens, and `row.labels` labels.
    """
    window = _encoder_minimum(model) | _hfq_former_minimum(model)
    of_row = {
        name: row.windows * operations for name, operations in window.items()
    } | _decoder_minimum(model, row)
    return {name: rows * operations for name, operations in of_row.items()}


def _encoder_minimum(model: FastSLM) -> dict[str, int]:
    """Of one window, forward only."""
    encoder, frames = model.encoder, model.window.frames
    length, width = encoder.max_positions, encoder.width
    bins = audio.N_FFT // 2 + 1
    block = 2 * length * (4 * width * width + 2 * width * encoder.mlp_dim)
    return {
        "log-mel": 2 * frames * (audio.N_FFT // 2 * 2 * bins + bins * encoder.num_mels),
        "encoder convolutions": 2 * 3 * (frames * encoder.num_mels + length * width) * width,
        "encoder projections": encoder.num_layers * block,
        "encoder attention": encoder.num_layers * 2 * 2 * length * length * width,
    }


def _hfq_former_minimum(model: FastSLM) -> dict[str, int]:
    """Of one window, forward and backward. Nothing flows back into the encoder's features, the first level."""
    former, width = model.hfq_former, model.encoder.width
    levels = [model.encoder.max_positions]
    for _ in former.stage_tokens[1:]:
        levels.append((levels[-1] + 1) // 2)
    down = 0
    for level, (before, after) in enumerate(itertools.pairwise(levels)):
        conv1, conv2 = 2 * 3 * before * width * width, 2 * 3 * after * width * width
        down += (3 if level else 2) * conv1 + 3 * conv2

    tokens, distilled = sum(former.stage_tokens), former.compression_size
    readings = [*zip(former.stage_tokens, levels, strict=True), (distilled, tokens)]
    scores = sum(queries * context for queries, context in readings)
    compressors = 3 * 2 * (2 * scores * width + (tokens + distilled) * width * width)

    features, layers = sum(levels), former.detail_recovery_layers
    projections = (
        3 * 2 * distilled * 6 * width * width
    )  # all four of self-attention, query and out of cross-attention
    key_value = 2 * 2 * (3 * features - levels[0]) * width * width
    attention = 3 * 2 * 2 * distilled * (distilled + features) * width
    return {
        "HFQ-Former downsamplers": down,
        "HFQ-Former compressors": compressors,
        "HFQ-Former detail recovery": layers * (projections + key_value + attention),
        "HFQ-Former projection": 3 * 2 * distilled * width * former.output_width,
    }


def _decoder_minimum(model: FastSLM, row: RowShape) -> dict[str, int]:
    """Of one row, forward and backward. Frozen weights: two products (output, gradient of the input); LoRA's: three."""
    llm = model.llm
    heads, kv_heads = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    shapes = [(llm.width, heads), (llm.width, kv_heads), (llm.width, kv_heads), (heads, llm.width)]
    shapes += [(llm.width, llm.mlp_dim), (llm.width, llm.mlp_dim), (llm.mlp_dim, llm.width)]
    weights = sum(width * features for width, features in shapes)
    adapters = llm.lora.rank * sum(width + features for width, features in shapes)
    pairs = row.tokens * (row.tokens + 1) // 2  # a token sees itself and those before it
    return {
        "decoder projections": llm.num_layers * 2 * 2 * row.tokens * weights,
        "decoder LoRA": llm.num_layers * 3 * 2 * row.tokens * adapters,
        "decoder attention": llm.num_layers * 3 * 2 * 2 * pairs * heads,
        "loss": 2 * 2 * row.labels * llm.width * llm.vocab_size,
    }
