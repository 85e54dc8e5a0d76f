"""Layers shared by the modules: convolution, attention, position tables, and the layer stack.

Shapes: b batch, t query time, s key time, n heads, h head dimension, d model width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fastslm_jax.errors import UserError
from fastslm_jax.models import attention
from fastslm_jax.models.attention import AttentionKernel
from fastslm_jax.models.lora import Projection

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
# Whisper and the HFQ-Former use the exact (erf) GELU.
gelu = functools.partial(jax.nn.gelu, approximate=False)
# Activations that a `remat` policy can save by name.
SAVEABLE = (
    *("attention", "query", "key", "value", "out"),
    *("gate", "up", "down", "mlp_in", "mlp_out"),
)


def frequencies(width: int, max_timescale: float = 10_000.0) -> np.ndarray:
    """Of Whisper's position table, in radians per position, falling: [width / 2]."""
    return np.exp(-np.log(max_timescale) / (width // 2 - 1) * np.arange(width // 2))


def sinusoids(length: int, width: int, max_timescale: float = 10_000.0) -> np.ndarray:
    """Whisper's fixed position table [length, width], float32: sine half, then cosine half."""
    if width % 2:
        raise ValueError(f"sinusoids need an even width, got {width}")
    angles = np.arange(length)[:, None] * frequencies(width, max_timescale)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sinusoid_init(
    key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Initializer of a position table.

    The table is a parameter, although never trained, so that a checkpoint's table is kept exactly.
    """
    del key
    return jnp.asarray(sinusoids(*shape), dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[b, t, d] → [b, t, n, h]."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


class Conv(nn.Module):
    """Convolution over time, kernel 3, padding 1: [b, t, d_in] → [b, ceil(t / stride), features].

    Computed as one matrix product over the three shifted inputs, which is fast on every backend.
    The kernel has shape [3, d_in, features].
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
        span = (out_length - 1) * self.stride + 1
        taps = [
            jax.lax.slice_in_dim(padded, tap, tap + span, self.stride, axis=1) for tap in range(3)
        ]
        columns = jnp.concatenate(taps, axis=-1).reshape(batch * out_length, 3 * width)
        y = columns @ kernel.astype(self.dtype).reshape(3 * width, self.features)
        y = (y + bias.astype(self.dtype)).reshape(batch, out_length, self.features)
        return nn.with_logical_constraint(y, ("rows", None, None))


class Attention(nn.Module):
    """Projected multi-head attention; as in Whisper, every projection but the key has a bias.

    Queries and keys are sown into the collection `attention`, see `attention_maps`.
    """

    num_heads: int
    attention_kernel: AttentionKernel = AttentionKernel()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, keys: int | None = None
    ) -> jax.Array:
        """x [b, t, d], context [b, s, d] (x itself by default) → [b, t, d].

        keys: length of the context; the rest of it is padding. None: s.
        """
        context = x if context is None else context
        width = x.shape[-1]
        query = Projection(width, use_bias=True, dtype=self.dtype, name="query")(x)
        key = Projection(width, dtype=self.dtype, name="key")(context)
        value = Projection(width, use_bias=True, dtype=self.dtype, name="value")(context)
        heads = [split_heads(y, self.num_heads) for y in (query, key, value)]
        self.sow("attention", "query_key", heads[:2])
        out = self.attention_kernel(*heads, keys=keys).reshape(query.shape)
        return Projection(width, use_bias=True, dtype=self.dtype, name="out")(out)


def stack(
    block: type[nn.Module], num_layers: int, policy: str, *, scan_layers: bool
) -> type[nn.Module]:
    """A stack of identical blocks whose parameters have a leading layer axis.

    Args:
        block: called as block(carry, *inputs) → (carry, None); all blocks get the same inputs.
        policy: rematerialization, see `remat`.
        scan_layers: run the blocks in a compiled loop; False unrolls it.
    """
    return nn.scan(
        remat(block, policy, scan_layers=scan_layers),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=num_layers,
        unroll=1 if scan_layers else num_layers,
    )


def remat(block: type[nn.Module], policy: str, *, scan_layers: bool) -> type[nn.Module]:
    """A block that rematerializes activations in the backward pass.

    Args:
        policy: activations to save. "none": all (no rematerialization). "full": only the
            block's input. "dots": results of matrix products without batch axes. Otherwise a
            comma-separated list of names in SAVEABLE, such as "attention,gate,up", and the products
            with lora_a, which are small.
        scan_layers: whether the blocks run in a loop. Outside a loop, common-subexpression
            elimination would undo the rematerialization and must be prevented.

    Raises:
        UserError: unknown policy or activation name.
    """
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if policy == "none":
        return block
    if policy not in policies:
        unknown = set(policy.split(",")) - set(SAVEABLE)
        if unknown:
            raise UserError(
                f"config.model.remat={policy}: unknown name {min(unknown)!r}; choose none, full, "
                f"dots, or a comma-separated list of {', '.join(SAVEABLE)}"
            )
        names = [*policy.split(","), "lora"]
        policies[policy] = jax.checkpoint_policies.save_only_these_names(*names)
        if "attention" in names:
            policies[policy] = jax.checkpoint_policies.save_from_both_policies(
                policies[policy], attention.is_saved
            )
    return nn.remat(block, prevent_cse=not scan_layers, policy=policies[policy])
