"""Attention kernels by platform.

| name             | kernel                                                          | runs on     |
|------------------|-----------------------------------------------------------------|-------------|
| xla              | blockwise attention in plain XLA (`blockwise_attention`)        | everywhere  |
| splash           | JAX's and our Pallas TPU kernels (see `tpu_attention`)          | TPU         |
| cudnn            | `jax.nn.dot_product_attention(implementation="cudnn")`          | GPU, 16 bit |
| triton           | flash attention with segment ids (JAX's Pallas GPU kernel)      | GPU, 16 bit |
| splash_interpret | splash in Pallas interpret mode, for tests without a TPU        | everywhere  |
| triton_interpret | triton in Pallas interpret mode, for tests without a GPU        | everywhere  |
| auto             | splash on TPU; cudnn and triton on GPU in 16 bit; else xla      | everywhere  |

A named kernel raises an error for inputs that it does not support. "auto" falls back to xla, logs
a warning once, and counts the fallback in CHOICES. Decoding from a key-value cache does not use
these kernels (see `kv_cache`): they are not designed for single-token queries.

On GPUs, "auto" uses cuDNN without segment ids and Pallas with them. The public interface of cuDNN
takes segment ids only as a mask [b, 1, t, t], which is stored, and differentiated if b is 1: 75 MB
per row of 6144 tokens, and as much for its gradient. The Pallas kernel reads the ids [b, t]. Not
used: JAX's Mosaic GPU attention has no segment ids, and `tokamax.dot_product_attention` takes them
only as a mask, too.

Shapes: b batch, t query time, s key time, n query heads, k key-value heads (n is a multiple of k),
h head dimension.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental.pallas.ops.gpu import attention as triton
from jax.extend.core import Primitive
from jax.sharding import Mesh

from fastslm_jax.errors import UserError
from fastslm_jax.models import blockwise_attention, tpu_attention
from fastslm_jax.models.attention_arrays import CausalSegments, pad, segment_ids, shard

NAMES = ("auto", "xla", "splash", "splash_interpret", "cudnn", "triton", "triton_interpret")
PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "triton": "gpu"}
# Triton blocks: the largest whose kernels fit the registers of an H100 with heads of 128 (ptxas
# reports no spills for 8 warps).
TRITON_BLOCKS = triton.BlockSizes(
    block_q=128, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64
)
TRITON_WARPS = 8
# Number of traced calls by "kernel: shapes (reason for a fallback)".
CHOICES: collections.Counter[str] = collections.Counter()


class KernelError(UserError):
    """The attention kernel does not support its inputs."""


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """Scaled dot-product attention with a chosen kernel.

    kernel: one of NAMES except "auto" (see `choose`).
    fall_back: use another kernel for inputs that this one does not support, instead of raising.
    mesh: mesh of the inputs. Pallas kernels need it, since XLA cannot partition them.
    """

    kernel: str = "xla"
    fall_back: bool = False
    mesh: Mesh | None = None

    @property
    def tpu(self) -> tpu_attention.TPUAttention:
        return tpu_attention.TPUAttention(self.mesh, self.kernel == "splash_interpret")

    def rotates(self, query: jax.Array, key: jax.Array, head_dim: int) -> bool:
        """Whether `tpu.rotate` can prepare query [b, t, n · h] and key [b, s, k · h]."""
        return self.kernel.startswith("splash") and self.tpu.rotates(query, key, head_dim)

    @property
    def multiple(self) -> int:
        """Lengths that are no multiple of this are padded, which copies the arrays."""
        return tpu_attention.MULTIPLE if self.kernel.startswith("splash") else 1

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: CausalSegments | None = None,
        keys: int | None = None,
        is_scaled: bool = False,
    ) -> jax.Array:
        """query [b, t, n, h], key and value [b, s, k, h] → [b, t, n, h].

        keys: number of keys; the rest of the s are padding. None: s. Not with a mask.
        is_scaled: the query has been multiplied by h ** -0.5 (by `tpu.rotate`).

        Raises:
            KernelError: the kernel does not support these shapes or dtypes, and fall_back is off.
        """
        reasons = []
        for kernel in self._candidates(mask):
            if kernel.startswith("splash"):
                attend = functools.partial(self.tpu.attention, keys=keys, is_scaled=is_scaled)
            else:
                attend = getattr(self, f"_{kernel.partition('_')[0]}")
                key, value = key[:, :keys], value[:, :keys]
                query = query * query.shape[3] ** 0.5 if is_scaled else query
            reason = self._refusal(kernel, query, key, mask) or _trace_error(
                kernel, attend, query, key, value, mask
            )
            if not reason:
                break
            if not self.fall_back:
                raise KernelError(f"config.model.attention={kernel}: {reason}; choose auto or xla")
            reasons.append(reason)
        self._count(kernel, query, key, "; ".join(reasons))
        return attend(query, key, value, mask)

    def _candidates(self, mask: CausalSegments | None) -> tuple[str, ...]:
        """Kernels to try, in this order."""
        if not self.fall_back:
            return (self.kernel,)
        is_packed = mask is not None and mask.segment_ids is not None
        is_placed = self.mesh is not None or jax.device_count() == 1
        first = ("triton",) if self.kernel == "cudnn" and is_packed and is_placed else ()
        return (*first, self.kernel, "xla")

    def _refusal(
        self, kernel: str, query: jax.Array, key: jax.Array, mask: CausalSegments | None
    ) -> str:
        """Why a kernel does not support these arrays; "" if it does."""
        head_dim, heads, kv_heads = query.shape[3], query.shape[2], key.shape[2]
        if kernel == "splash" and head_dim % 64:
            return f"head dimension {head_dim}; splash attention needs a multiple of 64"
        if kernel.startswith(("splash", "triton")):
            shards = 1 if self.mesh is None else self.mesh.shape["tensor"]
            if heads % shards or kv_heads % shards:
                return (
                    f"{heads} heads and {kv_heads} key-value heads are not divisible by "
                    f"config.mesh.tensor={shards}"
                )
        if kernel in ("cudnn", "triton"):
            label = {"cudnn": "cuDNN", "triton": "the Triton kernel"}[kernel]
            if query.dtype not in (jnp.bfloat16, jnp.float16):
                return f"dtype {query.dtype}; {label} needs bfloat16 or float16"
            if head_dim % 8 or head_dim > 128:
                return f"head dimension {head_dim}; {label} needs a multiple of 8 up to 128"
        if kernel.startswith("triton") and mask is None:
            return "no causal mask; the Triton kernel is used for the decoder only"
        return ""

    def _count(self, kernel: str, query: jax.Array, key: jax.Array, reason: str) -> None:
        shape = "x".join(map(str, query.shape))
        choice = f"{kernel}: queries {shape}, {key.shape[1]} keys"
        if reason:
            choice += f" ({reason})"
        CHOICES[choice] += 1
        if reason and CHOICES[choice] == 1:
            logging.warning("attention kernel: %s", choice)

    # ------------------------------------------------------------------------------------ kernels

    def _xla(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalSegments | None
    ) -> jax.Array:
        within = None if mask is None else mask.segment_ids
        return blockwise_attention.attention(
            query, key, value, is_causal=mask is not None, segment_ids=within
        )

    def _cudnn(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalSegments | None
    ) -> jax.Array:
        """cuDNN differentiates even lengths only, so odd ones are padded.

        Padded keys are masked by their number, or by causality. Padded queries are cut off.
        """
        rows, length, keys = query.shape[0], query.shape[1], key.shape[1]
        query, key, value = (pad(x, 1, 2) for x in (query, key, value))
        same = None
        if mask is not None and mask.segment_ids is not None:
            ids = pad(mask.segment_ids, 1, 2, -1)
            same = ids[:, None, :, None] == ids[:, None, None, :]
        is_masked = mask is None and key.shape[1] > keys
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=same,
            is_causal=mask is not None,
            key_value_seq_lengths=jnp.full(rows, keys, jnp.int32) if is_masked else None,
            implementation="cudnn",
        )
        return out[:, :length]

    def _triton(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalSegments | None
    ) -> jax.Array:
        length, groups = query.shape[1], query.shape[2] // key.shape[2]

        def per_device(
            query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array
        ) -> jax.Array:
            return triton.mha(
                query,
                jnp.repeat(key, groups, axis=2),
                jnp.repeat(value, groups, axis=2),
                ids,
                sm_scale=query.shape[3] ** -0.5,
                causal=True,
                block_sizes=TRITON_BLOCKS,
                num_warps=TRITON_WARPS,
                interpret=self.kernel == "triton_interpret",
            )

        arrays = (pad(x, 1, TRITON_BLOCKS.block_q) for x in (query, key, value))
        ids = pad(segment_ids(mask, query), 1, TRITON_BLOCKS.block_q, -1)
        heads = (None, "tensor", None)
        out = shard(self.mesh, per_device, (heads, heads, heads, ()), heads)(*arrays, ids)
        return out[:, :length]


def is_saved(primitive: Primitive, *_: object, **params: object) -> bool:
    """Rematerialization policy: save what the GPU kernels return, output and log-sum-exp.

    The TPU and XLA kernels name both "attention". The log-sum-exp of the GPU kernels has no name,
    and without it the backward pass would run the forward kernel again.
    """
    if primitive.name == "custom_vjp_call":
        return "mha_forward" in str(params["call_jaxpr"])
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _trace_error(
    kernel: str,
    attend: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: CausalSegments | None,
) -> str:
    """Why cuDNN refuses to be traced and differentiated, in its own words; "" if it does not."""
    if kernel != "cudnn":
        return ""

    def gradients(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(lambda *arrays: attend(*arrays, mask), *inputs)
        return backward(out)

    try:
        jax.eval_shape(gradients, query, key, value)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return ""


def choose(name: str, platform: str, dtype: jnp.dtype, mesh: Mesh | None = None) -> AttentionKernel:
    """The kernel for a name in NAMES (config.model.attention).

    Args:
        platform: "cpu", "tpu" or "gpu".
        dtype: compute dtype.
        mesh: mesh of the inputs.

    Raises:
        UserError: unknown name, or a kernel that the platform does not have.
    """
    if name not in NAMES:
        raise UserError(f"config.model.attention={name} is not one of {', '.join(NAMES)}")
    if name == "auto":
        is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        on_tpu = "splash" if mesh is not None or jax.device_count() == 1 else "xla"
        kernel = {"tpu": on_tpu, "gpu": "cudnn" if is_half else "xla"}.get(platform, "xla")
        return AttentionKernel(kernel, fall_back=True, mesh=None if kernel == "xla" else mesh)
    needs = PLATFORMS.get(name, platform)
    if needs != platform:
        raise UserError(
            f"config.model.attention={name} needs a {needs}, this platform is {platform}; "
            "choose auto or xla"
        )
    return AttentionKernel(name, mesh=None if name in ("xla", "cudnn") else mesh)
