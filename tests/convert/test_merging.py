"""Merging LoRA into kernels."""

import numpy as np

from fastslm_jax.convert.merging import merge_lora


def test_merges_in_float32_and_rounds_to_the_dtype_of_the_kernel():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 8, 6)).astype(np.float16)
    lora_a = rng.normal(size=(2, 8, 3)).astype(np.float32)
    lora_b = rng.normal(size=(2, 3, 6)).astype(np.float32)
    leaves = {
        "llm/layers/query/kernel": kernel,
        "llm/layers/query/lora_a": lora_a,
        "llm/layers/query/lora_b": lora_b,
    }
    merged = merge_lora(leaves, scale=2.0)
    assert merged.keys() == {"llm/layers/query/kernel"}
    leaf = merged["llm/layers/query/kernel"]
    expected = kernel.astype(np.float32) + 2.0 * np.einsum("lir,lro->lio", lora_a, lora_b)
    assert leaf.dtype == np.float16
    np.testing.assert_allclose(
        leaf.read().astype(np.float32),
        expected.astype(np.float16).astype(np.float32),
        rtol=1e-3,
    )
