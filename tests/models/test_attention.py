"""Attention kernels: each against XLA, choice by platform, and unsupported inputs."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from fastslm_jax import sharding
from fastslm_jax.errors import UserError
from fastslm_jax.models import attention
from fastslm_jax.models.attention import AttentionKernel, CausalSegments

XLA, SPLASH = AttentionKernel("xla"), AttentionKernel("splash_interpret")
TRITON = AttentionKernel("triton_interpret")


def arrays(rows=2, length=9, kv_length=None, heads=4, kv_heads=2, head_dim=16):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (length, heads), *[(kv_length or length, kv_heads)] * 2
    return [
        jax.random.normal(key, (rows, *size, head_dim))
        for key, size in zip(keys, sizes, strict=True)
    ]


def values_and_gradients(kernel, inputs, mask, weights):
    """The output [b, t, n, h] and the gradients of a weighted sum of it."""

    def weighted(*inputs):
        out = kernel(*inputs, mask)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


# Row 0 ends with padding; 150 is not a multiple of the block size.
SEGMENTS = jnp.array([[1] * 4 + [2] * 5 + [3] * 120 + [0] * 21, [1] * 150])
CASES = {
    "packed decoder": ({"length": 150}, CausalSegments(SEGMENTS)),
    "encoder": ({"length": 130, "kv_heads": 4}, None),
    "cross-attention": ({"length": 3, "kv_length": 200, "kv_heads": 4}, None),
}


def assert_matches_xla(kernel, inputs, mask):
    weights = jax.random.normal(jax.random.key(1), inputs[0].shape)
    got, expected = (values_and_gradients(k, inputs, mask, weights) for k in (kernel, XLA))
    for name, value, right in zip(("out", "query", "key", "value"), got, expected, strict=True):
        assert value.shape == right.shape
        np.testing.assert_allclose(value, right, atol=1e-5 * np.abs(right).max(), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_splash_attention_matches_xla(case):
    options, mask = CASES[case]
    assert_matches_xla(SPLASH, arrays(**options), mask)


@pytest.mark.parametrize("mask", [CausalSegments(SEGMENTS), CausalSegments()])
def test_triton_attention_matches_xla(mask):
    assert_matches_xla(TRITON, arrays(length=150), mask)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("longer", [0, 1])
def test_cudnn_gets_even_lengths_and_key_lengths(case, longer, monkeypatch):
    """cuDNN itself needs a GPU: here XLA takes the arrays that it would get."""
    attend, lengths = jax.nn.dot_product_attention, []

    def instead(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.append((query.shape[1] % 2, key.shape[1] % 2))
        return attend(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(AttentionKernel, "_refusal", lambda *_: "")
    options, mask = CASES[case]
    options = options | {"length": options["length"] - longer}
    if mask is None:
        options["kv_length"] = options.get("kv_length", options["length"]) - longer
    else:
        mask = CausalSegments(mask.segment_ids[:, : options["length"]])
    assert_matches_xla(AttentionKernel("cudnn"), arrays(**options), mask)
    assert set(lengths) == {(0, 0)}


@pytest.mark.parametrize("kernel", [SPLASH, TRITON])
def test_pallas_kernels_are_sharded_over_the_mesh(kernel):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    inputs = arrays(rows=4, length=20)
    mask = CausalSegments(jnp.ones((4, 20), jnp.int32))
    spread = jax.jit(dataclasses.replace(kernel, mesh=mesh))(*inputs, mask)
    np.testing.assert_allclose(spread, XLA(*inputs, mask), atol=1e-5)
    assert {shard.data.shape for shard in spread.addressable_shards} == {(1, 20, 2, 16)}
    # A batch of 3 is not divisible by 4 shards and is replicated.
    three = [x[:3] for x in inputs]
    replicated = jax.jit(dataclasses.replace(kernel, mesh=mesh))(*three, CausalSegments())
    np.testing.assert_allclose(replicated, XLA(*three, CausalSegments()), atol=1e-5)


# (queries, keys, heads, key-value heads, head dimension) of the full-size model.
FULL_SIZE = {
    "encoder": (1500, 1500, 20, 20, 64),
    "compressor 1": (80, 1500, 20, 20, 64),
    "compressor 2": (80, 750, 20, 20, 64),
    "compressor 3": (80, 375, 20, 20, 64),
    "semantic distillation": (50, 240, 20, 20, 64),
    "detail recovery, self": (50, 50, 20, 20, 64),
    "detail recovery, cross": (50, 2625, 20, 20, 64),
    "decoder": (6144, 6144, 32, 8, 128),
}
HAS_CUDNN = importlib.util.find_spec("jax_cuda12_plugin") is not None


@pytest.mark.parametrize("name", FULL_SIZE)
def test_auto_on_a_gpu_has_a_kernel_or_a_counted_fallback(name, monkeypatch):
    """For every attention of the full-size model, forward and backward. Nothing is run."""
    monkeypatch.setattr(attention, "CHOICES", type(attention.CHOICES)())
    kernel = attention.choose("auto", "gpu", jnp.bfloat16, sharding.make_mesh())
    length, keys, heads, kv_heads, head_dim = FULL_SIZE[name]
    sizes = (length, heads), (keys, kv_heads), (keys, kv_heads)
    inputs = [jax.ShapeDtypeStruct((8, *size, head_dim), jnp.bfloat16) for size in sizes]
    ids = jax.ShapeDtypeStruct((8, length), jnp.int32)

    def loss(query, key, value, ids):
        mask = CausalSegments(ids) if name == "decoder" else None
        return jnp.sum(kernel(query, key, value, mask).astype(jnp.float32))

    gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), *inputs, ids)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    ((choice, count),) = attention.CHOICES.items()
    expected = "triton: " if name == "decoder" else "cudnn: " if HAS_CUDNN else "xla: "
    assert choice.startswith(expected)
    assert count == 1
    # The decoder's segment ids are never compared as a [t, t] mask.
    assert choice.endswith(f"{keys} keys") or "(cuDNN is not detected)" in choice


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="requires a GPU (benchmarks/gpu.sh)")
@pytest.mark.parametrize("name", FULL_SIZE)
def test_kernels_on_a_gpu_match_xla(name):
    """Values and gradients in bfloat16, against float32: within 2 % of the largest."""
    length, keys, heads, kv_heads, head_dim = FULL_SIZE[name]
    inputs = arrays(1, length, keys, heads, kv_heads, head_dim)
    ids = jnp.arange(length)[None] // 1000
    mask = CausalSegments(ids) if name == "decoder" else None
    kernel = attention.choose("auto", "gpu", jnp.bfloat16, sharding.make_mesh())
    weights = jax.random.normal(jax.random.key(1), inputs[0].shape)
    halves = [x.astype(jnp.bfloat16) for x in inputs]
    got = values_and_gradients(kernel, halves, mask, weights)
    expected = values_and_gradients(XLA, inputs, mask, weights)
    for value, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, right, atol=2e-2 * np.abs(right).max())


def test_what_cudnn_refuses_is_a_counted_fallback(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("Unsupported sequence\n length.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    monkeypatch.setattr(attention, "CHOICES", type(attention.CHOICES)())
    inputs = [x.astype(jnp.bfloat16) for x in arrays()]
    kernel = attention.choose("auto", "gpu", jnp.bfloat16)
    np.testing.assert_array_equal(kernel(*inputs), XLA(*inputs))
    reason = "xla: queries 2x9x4x16, 9 keys (Unsupported sequence length)"
    assert attention.CHOICES[reason] == 1
    with pytest.raises(attention.KernelError, match="attention=cudnn: Unsupported sequence length"):
        attention.choose("cudnn", "gpu", jnp.bfloat16)(*inputs)


def test_a_saved_attention_is_not_computed_again():
    """The rematerialization policy "attention" saves the output and the log-sum-exp."""

    def kernels(save):
        policy = jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.save_only_these_names(*["attention"] * save),
            attention.is_saved if save else jax.checkpoint_policies.nothing_saveable,
        )
        block = jax.checkpoint(lambda *x: jnp.sin(TRITON(*x, CausalSegments())), policy=policy)
        gradient = jax.grad(lambda *x: jnp.sum(block(*x)), argnums=(0, 1, 2))
        return str(jax.make_jaxpr(gradient)(*arrays(length=128))).count("pallas_call[")

    assert kernels(save=False) == kernels(save=True) + 1


@pytest.mark.parametrize(
    ("platform", "dtype", "kernel"),
    [
        ("cpu", "bfloat16", "xla"),
        ("tpu", "float32", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),
    ],
)
def test_auto_chooses_the_kernel_of_the_platform(platform, dtype, kernel):
    mesh = sharding.make_mesh()
    chosen = attention.choose("auto", platform, dtype, mesh)
    assert (chosen.kernel, chosen.fall_back, chosen.mesh is not None) == (
        kernel,
        True,
        kernel != "xla",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "attention=flash is not one of auto, xla, splash, splash_interpret, cudnn"),
        ("splash", "attention=splash needs a tpu, this platform is cpu; choose auto or xla"),
        ("cudnn", "attention=cudnn needs a gpu, this platform is cpu; choose auto or xla"),
        ("triton", "attention=triton needs a gpu, this platform is cpu; choose auto or xla"),
    ],
)
def test_unavailable_kernels_raise(name, message):
    with pytest.raises(UserError, match=message):
        attention.choose(name, "cpu", jnp.float32)


UNSUPPORTED = [
    (
        AttentionKernel("splash"),
        {"head_dim": 80},
        "head dimension 80; splash attention needs a multiple of 64",
    ),
    (
        AttentionKernel("cudnn"),
        {"head_dim": 64},
        "dtype float32; cuDNN needs bfloat16 or float16",
    ),
    (
        AttentionKernel("triton_interpret"),
        {"head_dim": 64},
        "no causal mask; the Triton kernel is used for the decoder only",
    ),
    (
        "mesh",
        {"heads": 3, "kv_heads": 3},
        "3 heads and 3 key-value heads are not divisible by config.mesh.tensor=2",
    ),
]


@pytest.mark.parametrize(("kernel", "options", "message"), UNSUPPORTED)
def test_unsupported_inputs_raise_or_fall_back(kernel, options, message, monkeypatch):
    if kernel == "mesh":
        kernel = AttentionKernel("splash_interpret", mesh=sharding.make_mesh(data=4, tensor=2))
    inputs = arrays(**options)
    error = f"attention={kernel.kernel}: {message}; choose auto or xla"
    with pytest.raises(attention.KernelError, match=error):
        kernel(*inputs)

    warnings = []
    monkeypatch.setattr(absl_logging, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(attention, "CHOICES", type(attention.CHOICES)())
    falls_back = dataclasses.replace(kernel, fall_back=True)
    for _ in range(2):
        np.testing.assert_array_equal(falls_back(*inputs), XLA(*inputs))
    (warning,) = warnings
    assert message in warning
    assert [count for name, count in attention.CHOICES.items() if warning.endswith(name)] == [2]


def test_the_model_matches_with_splash_attention(model, params, batch):
    """Encoder, adapter and packed decoder: values and LoRA gradients."""
    splash_model = dataclasses.replace(
        model,
        **{
            name: getattr(model, name).clone(attention_kernel=SPLASH)
            for name in ("encoder", "adapter", "llm")
        },
    )
    rows = {name: value[:1] for name, value in batch.items()}

    def loss(model, lora):
        llm = params["llm"] | {
            "layers": params["llm"]["layers"]
            | {"up": params["llm"]["layers"]["up"] | {"lora_a": lora}}
        }
        hidden = model.hidden(params | {"llm": llm}, rows)
        return jnp.sum(jnp.sin(hidden) * (rows["segment_ids"] > 0)[:, :, None])

    lora = params["llm"]["layers"]["up"]["lora_a"]
    results = [
        jax.jit(jax.value_and_grad(lambda x, m=m: loss(m, x)))(lora) for m in (splash_model, model)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    np.testing.assert_allclose(
        results[0][1], results[1][1], atol=1e-4 * np.abs(results[1][1]).max()
    )
