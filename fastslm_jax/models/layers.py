"""Layers that the speech encoder and the HFQ-Former share.

Shapes: b batch, t query time, s key time, n heads, h head dimension, d model width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastslm_jax.errors import UserError
from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.lora import Projection

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
SAVEABLE = (
    "attention",
    "query",
    "key",
    "value",
    "out",
    "gate",
    "up",
    "down",
    "mlp_in",
    "mlp_out",
)  # names for `remat`
gelu = functools.partial(
    jax.nn.gelu, approximate=False
)  # the exact (erf) one everywhere on the speech side


def sinusoids(length: int, width: int, max_timescale: float = 10_000.0) -> np.ndarray:
    """Whisper's fixed position table [length, width], float32: the sine half, then the cosine half."""
    if width % 2:
        raise ValueError(f"sinusoids need an even width, got {width}")
    increment = np.log(max_timescale) / (width // 2 - 1)
    inverse_timescales = np.exp(-increment * np.arange(width // 2))
    angles = np.arange(length)[:, None] * inverse_timescales[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sinusoid_init(key, shape, dtype=jnp.float32):
    """Initialiser of a position table. It is a parameter, never trained, so that a checkpoint's own table is kept to the bit."""
    del key
    return jnp.asarray(sinusoids(*shape), dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[b, t, d] → [b, t, n, h]."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


class Conv(nn.Module):
    """Convolution over time, kernel 3, padding 1: [b, t, d_in] → [b, ceil(t / stride), features].

    Written as one matrix product of the three shifted inputs, which every backend runs at full speed. The kernel keeps
    the layout [3, d_in, features].
    """

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, width, self.features))
        kernel = nn.with_logical_constraint(kernel, (None, None, None))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (0, 0)))
        out_length = (length - 1) // self.stride + 1
        taps = [
            jax.lax.slice_in_dim(
                padded, tap, tap + (out_length - 1) * self.stride + 1, self.stride, axis=1
            )
            for tap in range(3)
        ]
        columns = jnp.concatenate(taps, axis=-1).reshape(batch * out_length, 3 * width)
        y = columns @ kernel.astype(self.dtype).reshape(3 * width, self.features) + bias.astype(
            self.dtype
        )
        return nn.with_logical_constraint(
            y.reshape(batch, out_length, self.features), ("rows", None, None)
        )


class Attention(nn.Module):
    """Projected multi-head attention: query, value and out with bias, key without (Whisper's convention)."""

    num_heads: int
    attend: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """x [b, t, d], context [b, s, d] (x itself by default) → [b, t, d]."""
        context = x if context is None else context
        width = x.shape[-1]
        query = Projection(width, use_bias=True, dtype=self.dtype, name="query")(x)
        key = Projection(width, dtype=self.dtype, name="key")(context)
        value = Projection(width, use_bias=True, dtype=self.dtype, name="value")(context)
        out = self.attend(*(split_heads(y, self.num_heads) for y in (query, key, value))).reshape(
            query.shape
        )
        return Projection(width, use_bias=True, dtype=self.dtype, name="out")(out)


def remat(block: type[nn.Module], policy: str, scan_layers: bool) -> type[nn.Module]:
    """A block whose backward pass computes activations anew, except those that the policy keeps.

    policy: "none" keeps all of them (no rematerialisation), "full" keeps the block's input only, "dots" keeps results of matrix
    products without batch axes, and names such as "attention,gate,up" keep those results: of attention, or of the projections
    called so.
    scan_layers: whether the blocks run in a loop. Outside a loop, CSE would undo the rematerialization.

    Raises:
        UserError: a name that no layer has.
    """
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if policy == "none":
        return block
    if policy not in policies:
        unknown = set(policy.split(",")) - set(SAVEABLE)
        if unknown:
            raise UserError(
                f"config.model.remat={policy}: {sorted(unknown)[0]!r} is none of none, full, dots, or names out of "
                f"{', '.join(SAVEABLE)}"
            )
        policies[policy] = jax.checkpoint_policies.save_only_these_names(*policy.split(","))
    return nn.remat(block, prevent_cse=not scan_layers, policy=policies[policy])
