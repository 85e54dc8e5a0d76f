"""Merges LoRA into the weights that it adapts."""

import functools
from collections.abc import Mapping

import numpy as np

from fastslm_jax.weights import engine
from fastslm_jax.weights.tensors import Tensor


def merge_lora(leaves: Mapping[str, engine.Leaf], scale: float) -> dict[str, engine.Leaf]:
    """Adds scale · A B to each adapted kernel and drops the LoRA leaves.

    Kernels are computed on demand, one layer at a time, in float32 and rounded to the dtype of the
    kernel.

    Args:
        leaves: {path: leaf}, with stacked kernels [layers, in, out].
        scale: LoRA's alpha / rank.
    """
    merged = {
        path: leaf for path, leaf in leaves.items() if not path.endswith(("/lora_a", "/lora_b"))
    }
    for path in leaves:
        if path.endswith("/lora_a"):
            prefix = path.removesuffix("/lora_a")
            merged[f"{prefix}/kernel"] = _merged_kernel(leaves, prefix, scale)
    return merged


def _merged_kernel(
    leaves: Mapping[str, engine.Leaf], prefix: str, scale: float
) -> engine.StoredLeaf:
    kernel, lora_a, lora_b = (leaves[f"{prefix}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
    shape, dtype = tuple(kernel.shape), np.dtype(kernel.dtype)

    def read(layer: int) -> np.ndarray:
        weight, a, b = (
            engine.read_part(leaf, layer).astype(np.float32) for leaf in (kernel, lora_a, lora_b)
        )
        return (weight + scale * (a @ b)).astype(dtype)

    parts = (
        Tensor(f"{prefix}/kernel[{layer}]", shape[1:], dtype, functools.partial(read, layer))
        for layer in range(shape[0])
    )
    return engine.StoredLeaf(shape, tuple(parts), is_stacked=True)
