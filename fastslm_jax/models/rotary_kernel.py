"""Norm and rotary embedding of queries and keys in one pass over memory: a Pallas TPU kernel.

XLA's TPU compiler stores the heads in float32, normalized, as halves, rotated and transposed: seven
times the bytes.

Shapes: b batch, t time, n heads, h head dimension.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Ref = jax.Ref
BLOCK = 512  # positions at a time
LANES = 128  # of a vector register: the head dimension


def supports(x: jax.Array, head_dim: int) -> bool:
    """Whether the kernel takes x [b, t, n · h]."""
    return head_dim == LANES and x.shape[1] % BLOCK == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def norm_and_rotate(
    x: jax.Array,
    scale: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    epsilon: float,
    factor: float,
    interpret: bool = False,
) -> jax.Array:
    """x [b, t, n · h] → [b, n, t, h]: factor · rotation(RMS norm of each head).

    Args:
        scale: [b, 1, h] of the norm; None: no norm.
        cos, sin: [b, t, h] float32; sin is negative in the first half.
    """
    kernel = functools.partial(_forward_kernel, epsilon=epsilon, factor=factor)
    return _call(kernel, (x,), scale, cos, sin, is_forward=True, interpret=interpret)


def _forward(
    x: jax.Array,
    scale: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    epsilon: float,
    factor: float,
    interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    out = norm_and_rotate(x, scale, cos, sin, epsilon, factor, interpret)
    return out, (x, scale, cos, sin)


def _backward(
    epsilon: float,
    factor: float,
    interpret: bool,
    residuals: tuple[jax.Array | None, ...],
    gradient: jax.Array,
) -> tuple[jax.Array | None, ...]:
    x, scale, cos, sin = residuals
    kernel = functools.partial(_backward_kernel, epsilon=epsilon, factor=factor)
    d_x = _call(kernel, (x, gradient), scale, cos, sin, is_forward=False, interpret=interpret)
    if scale is None:
        return d_x, None, None, None
    # In plain XLA: dead code unless the norm is trained.
    heads = x.reshape(*x.shape[:2], -1, LANES).swapaxes(1, 2).astype(jnp.float32)
    turned = _unrotate(gradient, factor, cos[:, None], sin[:, None], jnp.roll)
    d_scale = jnp.sum(turned * heads * _inverse_rms(heads, epsilon), axis=(1, 2))
    return d_x, d_scale[:, None].astype(scale.dtype), None, None


norm_and_rotate.defvjp(_forward, _backward)


def _call(
    kernel: functools.partial,
    arrays: tuple[jax.Array, ...],
    scale: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    is_forward: bool,
    interpret: bool,
) -> jax.Array:
    """Runs a kernel on one head and BLOCK positions at a time.

    arrays: x [b, t, n · h] and, backward, the gradient [b, n, t, h].
    """
    x = arrays[0]
    batch, length, width = x.shape
    heads = width // LANES
    columns = pl.BlockSpec((None, BLOCK, LANES), lambda b, t, n: (b, t, n))
    by_head = pl.BlockSpec((None, None, BLOCK, LANES), lambda b, t, n: (b, n, t, 0))
    table = pl.BlockSpec((None, BLOCK, LANES), lambda b, t, n: (b, t, 0))
    vector = pl.BlockSpec((None, 1, LANES), lambda b, t, n: (b, 0, 0))
    shape = (batch, heads, length, LANES) if is_forward else x.shape
    scales = () if scale is None else (scale.astype(jnp.float32),)
    return pl.pallas_call(
        kernel,
        grid=(batch, length // BLOCK, heads),  # the tables stay while the heads change
        in_specs=[*(columns, by_head)[: len(arrays)], table, table, *(vector for _ in scales)],
        out_specs=by_head if is_forward else columns,
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        interpret=interpret,
        name="rotary_forward" if is_forward else "rotary_backward",
    )(*arrays, cos, sin, *scales)


def _forward_kernel(
    x_ref: Ref, cos_ref: Ref, sin_ref: Ref, *refs: Ref, epsilon: float, factor: float
) -> None:
    *scales, out_ref = refs
    x = x_ref[...].astype(jnp.float32)
    for scale_ref in scales:
        x = x * _inverse_rms(x, epsilon) * scale_ref[...]
        x = x.astype(out_ref.dtype).astype(jnp.float32)  # as the result of a norm
    out = x * cos_ref[...] + pltpu.roll(x, LANES // 2, 1) * sin_ref[...]
    out_ref[...] = out.astype(out_ref.dtype) * jnp.asarray(factor, out_ref.dtype)


def _backward_kernel(
    x_ref: Ref,
    gradient_ref: Ref,
    cos_ref: Ref,
    sin_ref: Ref,
    *refs: Ref,
    epsilon: float,
    factor: float,
) -> None:
    *scales, out_ref = refs
    gradient = _unrotate(gradient_ref[...], factor, cos_ref[...], sin_ref[...], pltpu.roll)
    for scale_ref in scales:
        x = x_ref[...].astype(jnp.float32)
        inverse = _inverse_rms(x, epsilon)
        gradient = gradient * scale_ref[...]
        along = jnp.mean(gradient * x, axis=-1, keepdims=True) * jnp.square(inverse)
        gradient = inverse * (gradient - x * along)
    out_ref[...] = gradient.astype(out_ref.dtype)


def _unrotate(
    gradient: jax.Array,
    factor: float,
    cos: jax.Array,
    sin: jax.Array,
    roll: Callable[[jax.Array, int, int], jax.Array],
) -> jax.Array:
    """Gradient of the rotation's input from that of its result; the last axis is h."""
    gradient = (gradient * jnp.asarray(factor, gradient.dtype)).astype(jnp.float32)
    return gradient * cos + roll(gradient * sin, LANES // 2, gradient.ndim - 1)


def _inverse_rms(x: jax.Array, epsilon: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
