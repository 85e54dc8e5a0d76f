"""Linear layer of all modules, with optional low-rank adaptation (LoRA, arXiv 2106.09685)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

DECODING_ROWS = 128  # up to this many rows, a product takes as long as reading its kernel


@dataclasses.dataclass(frozen=True)
class LoRA:
    """LoRA options; with rank 0 there are no LoRA parameters."""

    rank: int = 0
    alpha: float = 64.0
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Projection(nn.Module):
    """y = x W (+ bias) (+ gate · scale · dropout(x) A B).

    The result is named after the layer for rematerialization policies (see `layers.remat`).

    Parameters: kernel [d_in, features], bias [features], lora_a [d_in, rank], and lora_b
    [rank, features], initialized to zero.
    """

    features: int
    use_bias: bool = False
    lora: LoRA = LoRA()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, lora_gate: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """x [..., d_in] → [..., features].

        lora_gate: [...], 1 where LoRA is on and 0 where it is off; None: on everywhere.
        """
        width = x.shape[-1]
        # Logical axes, see `sharding.ACTIVATION_TABLE`.
        inputs, columns = f"{self.name}_inputs", f"{self.name}_columns"
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))
        kernel = nn.with_logical_constraint(kernel, (inputs, columns))
        # Flatten to 2D: XLA's CPU matrix product is twice as slow on 3D operands.
        flat = x.reshape(-1, width).astype(self.dtype)
        y = _matmul(flat, kernel.astype(self.dtype))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.lora.rank:
            lora_a = self.param("lora_a", nn.initializers.he_uniform(), (width, self.lora.rank))
            lora_b = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, self.features))
            lora_a = nn.with_logical_constraint(lora_a, (inputs, None))
            lora_b = nn.with_logical_constraint(lora_b, (None, columns))
            adapted = nn.Dropout(self.lora.dropout)(flat, deterministic=deterministic)
            low_rank = checkpoint_name(adapted @ lora_a.astype(self.dtype), "lora")
            delta = low_rank @ lora_b.astype(self.dtype) * self.lora.scale
            if lora_gate is not None:
                delta *= lora_gate.reshape(-1, 1).astype(self.dtype)
            y += delta
        # On the matrix: between two reshapes, a constraint keeps XLA from removing them.
        y = nn.with_logical_constraint(y, ("rows", columns))
        return checkpoint_name(y.reshape(*x.shape[:-1], self.features), self.name)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [rows, d_in], kernel [d_in, features] → [rows, features].

    With the few rows of a decoding step, XLA's GPU compiler does two things that move the kernel
    three times instead of once. It multiplies a single row element by element and stores the
    products: two rows are multiplied as matrices. And for every token it joins the kernels of
    products with the same x: behind a barrier, each product has an x of its own.
    """

    def on_gpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0)))
        return (jax.lax.optimization_barrier(rows) @ kernel)[: len(x)]

    if x.shape[0] > DECODING_ROWS:
        return x @ kernel
    return jax.lax.platform_dependent(x, kernel, cuda=on_gpu, rocm=on_gpu, default=jnp.matmul)
