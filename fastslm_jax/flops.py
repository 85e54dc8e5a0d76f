"""FLOPs of matrix products: those a traced step executes, and the minimum the model requires.

A product [m, k] × [k, n] counts as 2·m·k·n. Elementwise operations are not counted.
docs/performance.md derives the minimum term by term.
"""

import json
import math
from collections.abc import Iterator

import jax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from fastslm_jax import audio
from fastslm_jax.data.packing import RowShape
from fastslm_jax.models import attention
from fastslm_jax.models.fastslm import FastSLM

# Matrix products per visited score block in the splash attention kernels. Forward: QK and PV.
# Backward, after recomputing QK: dV, dP and dK (dkv) and dP and dQ (dq), or all of them in one
# kernel (use_fused_bwd_kernel).
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}
# `models.paired_attention`: scores and values; scores again, dV, dP, dK and dQ.
PAIRED_PRODUCTS = {"paired_attention_forward": 2, "paired_attention_backward": 5}
# Flash attention on GPUs. cuDNN's backward pass is one kernel as in arXiv 2307.08691; its blocks
# are not public: 128 × 128 is assumed. Pallas computes dkv and dq in two loops.
CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
CUDNN_BLOCK = 128


class UncountableError(ValueError):
    """The FLOPs of a loop or kernel cannot be derived from its jaxpr."""


# ------------------------------------------------------------------------------------- executed


def executed(traced: jax.stages.Traced) -> int:
    """FLOPs of a traced function (`jax.jit(f).trace(...)`), summed over all devices.

    Scan bodies are multiplied by the scan length, rematerialized operations are counted each time
    they run, and a conditional counts as its most expensive branch. Dead code is not counted.

    Raises:
        UncountableError: a while loop contains matrix products, or a kernel has no formula.
    """
    jaxpr = traced.jaxpr.jaxpr
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(live)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out_axis = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_axis]
    if name in CUDNN_PRODUCTS:
        return _count_cudnn(equation)
    if name == "pallas_call" and str(params["name"]).startswith("mha_"):
        return _count_triton(equation)
    if name == "pallas_call" and str(params["name"]).startswith("rotary_"):
        return 0  # no products
    if name == "pallas_call" and str(params["name"]) in PAIRED_PRODUCTS:
        (batch, length, width), (_, context, _) = (
            equation.invars[index].aval.shape for index in (0, -1)
        )
        return PAIRED_PRODUCTS[str(params["name"])] * 2 * batch * length * context * width
    if name == "pallas_call":
        return _count_splash(equation)
    inner = [_count(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise UncountableError(
            "a while loop with an unknown trip count contains matrix products; use scan"
        )
    if name == "shard_map":  # its body is the program of one device
        axes = params["newly_manual_axes"]
        return sum(inner) * math.prod(params["mesh"].shape[axis] for axis in axes)
    return sum(inner)


def _inner_jaxprs(params: dict[str, object]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _count_cudnn(equation: JaxprEqn) -> int:
    """FLOPs of cuDNN's attention: query [b, t, n, h] and key [b, s, k, h] are its first inputs."""
    (batch, length, heads, head_dim), (_, context, *_) = (x.aval.shape for x in equation.invars[:2])
    is_causal = "CAUSAL" in str(equation.params["mask_type"])
    scores = visited_scores(length, context, CUDNN_BLOCK, CUDNN_BLOCK, is_causal)
    return CUDNN_PRODUCTS[equation.primitive.name] * 2 * scores * head_dim * heads * batch


def _count_triton(equation: JaxprEqn) -> int:
    """FLOPs of the Pallas GPU attention, which `models.attention` calls for causal rows only."""
    blocks, shape = attention.TRITON_BLOCKS, equation.invars[0].aval.shape
    batch, length, heads, head_dim = shape
    parts = {  # (products, query block, key block) of each loop
        "mha_forward": [(2, blocks.block_q, blocks.block_k)],
        "mha_preprocess_backward": [],
        "mha_backward": [
            (4, blocks.block_q_dkv, blocks.block_kv_dkv),
            (3, blocks.block_q_dq, blocks.block_kv_dq),
        ],
    }[str(equation.params["name"])]
    scores = sum(
        products * visited_scores(length, length, block_q, block_kv, is_causal=True)
        for products, block_q, block_kv in parts
    )
    return 2 * scores * head_dim * heads * batch


def _count_splash(equation: JaxprEqn) -> int:
    """FLOPs of a splash attention kernel, for all heads and batch rows.

    Every product costs 2 · visited scores · head dimension, see `visited_scores`.
    """
    params = equation.params
    name = str(params["name"])
    kernel = next((kind for kind in ("fwd", "dq", "dkv") if f"_{kind}_" in name), None)
    if kernel is None or not name.startswith("splash_mha"):
        raise UncountableError(
            f"the FLOPs of kernel {name} are unknown; add its formula to fastslm_jax/flops.py"
        )
    # Operands: two block tables, q, k, v, query and key segment ids if there are segments, and the
    # query positions if the mask is causal. Backward kernels have three more.
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
    """Attention scores computed by a blockwise kernel, which skips fully masked blocks only.

    Example: 4 queries and 4 keys in blocks of 2, causal → 12 of 16.
    """
    if not is_causal:
        return length * context
    last_queries = range(block_q - 1, length + -length % block_q, block_q)
    return sum(min(context, (last // block_kv + 1) * block_kv) * block_q for last in last_queries)


# -------------------------------------------------------------------------------------- minimum


def minimum(model: FastSLM, row: RowShape, rows: int = 1) -> dict[str, int]:
    """Minimum FLOPs of a training step by term; docs/performance.md derives them.

    The encoder and the base weights of the decoder are frozen: the encoder runs forward only, and
    the decoder computes no weight gradients. Rows are assumed full: one recording over all windows
    and tokens, and `row.labels` labels.
    """
    per_window = _encoder_minimum(model)
    per_window |= model.adapter.minimum_flops(model.encoder.max_positions, model.encoder.width)
    per_row = {name: row.windows * flops for name, flops in per_window.items()}
    per_row |= _decoder_minimum(model, row)
    return {name: rows * flops for name, flops in per_row.items()}


def _encoder_minimum(model: FastSLM) -> dict[str, int]:
    """FLOPs per window, forward.

    Log-mel is a DFT as two matrix products, real and imaginary. The symmetry of the window function
    halves the N_FFT samples of a frame (`models.log_mel.power_spectrum`).
    """
    encoder, frames = model.encoder, model.window.frames
    length, width = encoder.max_positions, encoder.width
    bins = audio.N_FFT // 2 + 1
    block = 2 * length * (4 * width * width + 2 * width * encoder.mlp_dim)
    return {
        "log-mel": 2 * frames * (2 * (audio.N_FFT // 2) * bins + bins * encoder.num_mels),
        "encoder convolutions": 2 * 3 * (frames * encoder.num_mels + length * width) * width,
        "encoder projections": encoder.num_layers * block,
        "encoder attention": encoder.num_layers * 2 * 2 * length * length * width,
    }


def _decoder_minimum(model: FastSLM, row: RowShape) -> dict[str, int]:
    """FLOPs per row, forward and backward.

    A frozen weight takes two products (output, input gradient), a LoRA weight three.
    """
    llm = model.llm
    heads, kv_heads = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    shapes = [(llm.width, heads), (llm.width, kv_heads), (llm.width, kv_heads), (heads, llm.width)]
    shapes += [(llm.width, llm.mlp_dim), (llm.width, llm.mlp_dim), (llm.mlp_dim, llm.width)]
    weights = sum(width * features for width, features in shapes)
    adapters = llm.lora.rank * sum(width + features for width, features in shapes)
    pairs = row.tokens * (row.tokens + 1) // 2  # of a causal mask
    return {
        "decoder projections": llm.num_layers * 2 * 2 * row.tokens * weights,
        "decoder LoRA": llm.num_layers * 3 * 2 * row.tokens * adapters,
        "decoder attention": llm.num_layers * 3 * 2 * 2 * pairs * heads,
        "loss": 2 * 2 * row.labels * llm.width * llm.vocab_size,
    }
