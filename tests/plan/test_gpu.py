"""Programs compiled for GPUs without one, by XLA's CUDA plugin (`make test-gpu-compile`)."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from fastslm_jax import chips, compiler, flops, sharding
from fastslm_jax.inference import programs
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models.attention import AttentionKernel, CausalSegments
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.plan import hlo, traffic
from fastslm_jax.plan.compile import plan, set_rows

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="requires XLA's CUDA plugin (pip install -e .[plan-gpu])",
    ),
]
CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


@pytest.fixture(scope="module")
def gpu():
    return chips.parse_topology("h100:1").devices()[0]


def shape(device, *sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))


# --------------------------------------------------------------------------------------- train step


def test_a_plan_for_two_nodes_of_gpus(config, tmp_path):
    config.model.remat = "attention,query,key,value,out,gate,up"
    config.mesh.update({"data": -1, "fsdp": 2})
    config.data.row.tokens = 250  # padded to 256 by the Triton kernel
    topology = chips.parse_topology("h100:2x2")
    devices = topology.devices()
    set_rows(config, devices, topology.chip, rows_per_chip=1)
    text = tmp_path / "step.hlo"
    result = plan(config, devices, topology.chip, "h100:2x2", str(text))
    assert (result["chips"], result["mesh"]) == (4, {"data": 2, "fsdp": 2, "tensor": 1})
    assert result["fits"]
    # Weights are gathered within a node; between them, gradients are reduced.
    within, between = result["networks"]["ici"], result["networks"]["dcn"]
    assert result["collective_gib_by_kind"]["all-gather"] <= within["gib"]
    trained = result["hbm_gib"]["trained"]
    assert 0 < between["gib"] < 1.5 * trained
    assert between["seconds"] == pytest.approx(between["gib"] * 2**30 / 50e9)
    assert within["seconds"] == pytest.approx(within["gib"] * 2**30 / 450e9)
    assert len(result["traffic"]) == 10
    assert any(entry["source"].startswith("models/") for entry in result["traffic"])
    # Every attention has a kernel: the packed decoder Pallas', the others cuDNN's.
    calls = re.findall(r'custom_call_target="([^"]+)"', text.read_text())
    assert {"__gpu$xla.gpu.triton", *CUDNN} <= set(calls)
    # A saved attention is not computed again: each loop over layers has its kernel once.
    kernels = re.findall(r"%pallas_call\S* = .*mha_(\w+)/", text.read_text())
    assert sorted(kernels) == ["backward", "forward", "preprocess_backward"]


# (queries, keys, heads, key-value heads, head dimension)
SHAPES = [
    *((1500, 1500, 20, 20, 64), (80, 1500, 20, 20, 64), (80, 750, 20, 20, 64)),
    *((80, 375, 20, 20, 64), (50, 240, 20, 20, 64), (50, 50, 20, 20, 64)),
    *((50, 2625, 20, 20, 64), (6144, 6144, 32, 8, 128)),
]


@pytest.mark.parametrize("sizes", SHAPES, ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
@pytest.mark.parametrize("card", ["a100-80", "h100", "b200"])
def test_every_attention_of_the_full_size_model_compiles(card, sizes):
    """Forward and backward, in bfloat16; no array has a query and a key dimension."""
    device = chips.parse_topology(f"{card}:1").devices()[0]
    length, keys, heads, kv_heads, head_dim = sizes
    is_packed = length == 6144
    mesh = sharding.make_mesh(devices=[device])
    kernel = AttentionKernel("triton" if is_packed else "cudnn", mesh=mesh if is_packed else None)

    def loss(query, key, value, ids):
        mask = CausalSegments(ids) if is_packed else None
        return jnp.sum(kernel(query, key, value, mask).astype(jnp.float32))

    arrays = [
        shape(device, 1, length, heads, head_dim),
        shape(device, 1, keys, kv_heads, head_dim),
        shape(device, 1, keys, kv_heads, head_dim),
        shape(device, 1, length, dtype=jnp.int32),
    ]
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays)
    text = lowered.compile(compiler_options=compiler.NO_GPU).as_text()
    calls = set(re.findall(r'custom_call_target="([^"]+)"', text))
    assert calls == ({"__gpu$xla.gpu.triton"} if is_packed else set(CUDNN))
    padded = keys + keys % 2
    assert f"{length},{padded}]" not in re.sub(r"backend_config=.*", "", text)


@pytest.mark.parametrize(("length", "keys"), [(256, 256), (80, 376), (50, 240)])
def test_flops_of_cudnn_are_those_of_blockwise_attention(length, keys):
    """Both compute two products forward, and recompute one of five backward."""
    arrays = [jax.ShapeDtypeStruct((2, size, 4, 64), jnp.bfloat16) for size in (length, keys, keys)]

    def count(kernel, is_gradient):
        def loss(*arrays):
            return jnp.sum(AttentionKernel(kernel)(*arrays).astype(jnp.float32))

        function = jax.grad(loss, (0, 1, 2)) if is_gradient else loss
        return flops.executed(jax.jit(function).trace(*arrays))

    assert count("cudnn", False) == count("xla", False) == 2 * 2 * 2 * 4 * length * keys * 64
    assert count("cudnn", True) == count("xla", True)


def test_flops_of_causal_cudnn():
    """Blocks of 128 × 128 above the diagonal are skipped: 3 of 4 are left."""
    array = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    traced = jax.jit(lambda x: AttentionKernel("cudnn")(x, x, x, CausalSegments())).trace(array)
    assert flops.executed(traced) == 2 * 2 * (3 * 128 * 128) * 4 * 64


def test_traffic_of_cudnn_is_its_operands_and_results(gpu):
    array = shape(gpu, 2, 256, 4, 64)
    attend = jax.jit(lambda *x: AttentionKernel("cudnn")(*x))
    program = hlo.Program(attend.lower(array, array, array).compile().as_text())
    calls = [
        entry
        for entry in traffic.by_instruction(program)
        if "__cudnn$" in entry.instruction.attributes
    ]
    assert [entry.bytes_moved for entry in calls] == [4 * 2 * 256 * 4 * 64 * 2]


# --------------------------------------------------------------------------------------- generation

ROWS, LENGTH = 16, 512


@pytest.fixture(scope="module")
def decoder(model, params):
    """The tests' model with the head dimension of the full-size one, in bfloat16, on an H100."""
    llm: Decoder = model.llm.clone(scan_layers=False, dtype=jnp.bfloat16, head_dim=128)
    model = dataclasses.replace(model, llm=llm)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.eval_shape(programs.separate_layers, shapes)


def lower_decode(model, params, gpu, rows):
    def placed(leaf, dtype=None):
        return shape(gpu, *np.shape(leaf), dtype=dtype or leaf.dtype)

    params = jax.tree.map(lambda leaf: placed(leaf, jnp.bfloat16), params)
    cache = jax.tree.map(placed, jax.eval_shape(lambda: model.llm.init_cache(rows, LENGTH)))
    state = jax.tree.map(placed, programs.DecodeState.idle(rows))
    controls = SamplingParams().controls()
    return cache, programs.decode.lower(
        model, params, cache, state, None, controls, 0, 64, rows, True, greedy=True, mesh=None
    )


@pytest.mark.parametrize("rows", [1, ROWS])
def test_decoding_copies_neither_weights_nor_cache(decoder, gpu, rows):
    model, params = decoder
    cache, lowered = lower_decode(model, params, gpu, rows)
    text = lowered.compile().as_text()
    program = hlo.Program(text)
    (loop,) = (i for i in program.computations[program.entry] if i.opcode == "while")
    step = traffic.by_instruction(program.body(loop), unknown_trips=1)
    # The only loops inside a step are those over the blocks of the cache, one per layer: none over
    # the rows in the cache write.
    inside = program.body(loop).execution_counts(unknown_trips=1)
    loops = [i for name in inside for i in program.computations[name] if i.opcode == "while"]
    assert len(loops) == model.llm.num_layers
    # No instruction moves as much as the keys of one layer.
    layer = cache.keys.size * 2 / model.llm.num_layers
    assert max(entry.bytes_moved for entry in step) < layer
    # Weights are read where they are: no kernel is copied or sliced.
    leaves = jax.tree.leaves(params["llm"]["layers"]["0"])
    kernels = {",".join(map(str, leaf.shape)) for leaf in leaves if leaf.ndim == 2}
    copied = re.findall(r"= bf16\[([\d,]+)\]\S* (?:copy|slice|dynamic-slice)\(", text)
    assert not kernels & set(copied)


def test_prefill_writes_the_cache_in_place(decoder, gpu):
    model, params = decoder

    def placed(leaf, dtype=None):
        return shape(gpu, *np.shape(leaf), dtype=dtype or leaf.dtype)

    params = jax.tree.map(lambda leaf: placed(leaf, jnp.bfloat16), params)
    cache = jax.tree.map(placed, jax.eval_shape(lambda: model.llm.init_cache(ROWS, LENGTH)))
    rows, tokens = shape(gpu, 2, dtype=jnp.int32), shape(gpu, 2, 64, dtype=jnp.int32)
    lowered = programs.prefill.lower(
        model, params, cache, rows, rows, tokens, None, None, mesh=None
    )
    compiled = lowered.compile()
    whole = cache.keys.size * 2
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * whole
    program = hlo.Program(compiled.as_text())
    entries = traffic.by_instruction(program, unknown_trips=1)
    assert max(entry.bytes_moved for entry in entries) < whole
