"""Attention kernels by platform.

| name             | kernel                                                          | runs on     |
|------------------|-----------------------------------------------------------------|-------------|
| xla              | blockwise attention in plain XLA (`blockwise_attention`)        | everywhere  |
| splash           | splash attention with segment ids (JAX's Pallas TPU kernel)     | TPU         |
| cudnn            | `jax.nn.dot_product_attention(implementation="cudnn")`          | GPU, 16 bit |
| splash_interpret | splash in Pallas interpret mode, for tests without a TPU        | everywhere  |
| auto             | splash on TPU, cudnn on GPU in 16 bit, else xla                 | everywhere  |

A named kernel raises an error for inputs that it does not support. "auto" falls back to xla, logs
a warning once, and counts the fallback in CHOICES. Decoding from a key-value cache does not use
these kernels (see `kv_cache`): they are not designed for single-token queries.

Shapes: b batch, t query time, s key time, n query heads, k key-value heads (n is a multiple of k),
h head dimension.
"""

import collections
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, PartitionSpec

from fastslm_jax.errors import UserError
from fastslm_jax.models import blockwise_attention

NAMES = ("auto", "xla", "splash", "splash_interpret", "cudnn")
# Splash attention blocks; the largest one that divides the padded length is used.
BLOCKS = (512, 384, 256, 128)
# Number of traced calls by "kernel: shapes (reason for a fallback)".
CHOICES: collections.Counter[str] = collections.Counter()


@flax.struct.dataclass
class CausalSegments:
    """Causal mask within segments, not materialized.

    segment_ids: [b, t]; None for one segment.
    """

    segment_ids: jax.Array | None = None


class KernelError(UserError):
    """The attention kernel does not support its inputs."""


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """Scaled dot-product attention with a chosen kernel.

    kernel: one of NAMES except "auto" (see `choose`).
    fall_back: use xla for inputs that the kernel does not support, instead of raising.
    mesh: mesh of the inputs. Splash attention needs it, since XLA cannot partition a Pallas kernel.
    """

    kernel: str = "xla"
    fall_back: bool = False
    mesh: Mesh | None = None

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalSegments | None = None
    ) -> jax.Array:
        """query [b, t, n, h], key and value [b, s, k, h] → [b, t, n, h].

        Raises:
            KernelError: the kernel does not support these shapes or dtypes, and fall_back is off.
        """
        kernel, reason = self.kernel, ""
        if reason := self._refusal(query, key):
            if not self.fall_back:
                raise KernelError(f"config.model.attention={kernel}: {reason}; choose auto or xla")
            kernel = "xla"
        self._count(kernel, query, key, reason)
        if kernel.startswith("splash"):
            return self._splash(query, key, value, mask)
        within = None if mask is None else mask.segment_ids
        if kernel == "xla":
            return blockwise_attention.attention(
                query, key, value, is_causal=mask is not None, segment_ids=within
            )
        same = None if within is None else (within[:, None, :, None] == within[:, None, None, :])
        out = jax.nn.dot_product_attention(
            query, key, value, mask=same, is_causal=mask is not None, implementation="cudnn"
        )
        return checkpoint_name(out, "attention")

    def _refusal(self, query: jax.Array, key: jax.Array) -> str:
        """Why the kernel does not support these arrays; "" if it does."""
        head_dim, heads, kv_heads = query.shape[3], query.shape[2], key.shape[2]
        if self.kernel.startswith("splash"):
            if head_dim % 64 and self.kernel == "splash":
                return f"head dimension {head_dim}; splash attention needs a multiple of 64"
            shards = 1 if self.mesh is None else self.mesh.shape["tensor"]
            if heads % shards or kv_heads % shards:
                return (
                    f"{heads} heads and {kv_heads} key-value heads are not divisible by "
                    f"config.mesh.tensor={shards}"
                )
        if self.kernel == "cudnn":
            if query.dtype not in (jnp.bfloat16, jnp.float16):
                return f"dtype {query.dtype}; cuDNN needs bfloat16 or float16"
            if head_dim % 8 or head_dim > 128:
                return f"head dimension {head_dim}; cuDNN needs a multiple of 8 up to 128"
        return ""

    def _count(self, kernel: str, query: jax.Array, key: jax.Array, reason: str) -> None:
        shape = "x".join(map(str, query.shape))
        choice = f"{kernel}: queries {shape}, {key.shape[1]} keys"
        if reason:
            choice += f" ({reason})"
        CHOICES[choice] += 1
        if reason and CHOICES[choice] == 1:
            logging.warning("attention kernel: %s", choice)

    def _splash(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalSegments | None
    ) -> jax.Array:
        length, kv_length = query.shape[1], key.shape[1]
        padded, kv_padded = (-(-size // 128) * 128 for size in (length, kv_length))

        def pad(x: jax.Array, size: int) -> jax.Array:  # → [b, n, size, h]
            return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)))

        def pad_ids(size: int, total: int) -> jax.Array:
            ids = None if mask is None else mask.segment_ids
            ids = jnp.zeros((query.shape[0], size), jnp.int32) if ids is None else ids
            # Padding gets a separate segment.
            return jnp.pad(ids, ((0, 0), (0, total - size)), constant_values=-1)

        def per_device(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            q_ids: jax.Array,
            kv_ids: jax.Array,
        ) -> jax.Array:
            shape = (padded, kv_padded)
            head_mask = splash.FullMask(shape) if mask is None else splash.CausalMask(shape)
            block_q, block_kv = (
                next(size for size in BLOCKS if total % size == 0) for total in shape
            )
            kernel = splash.make_splash_mha(
                splash.MultiHeadMask([head_mask] * query.shape[1]),
                block_sizes=splash.BlockSizes(
                    block_q=block_q,
                    block_kv=block_kv,
                    block_q_dkv=block_q,
                    block_kv_dkv=block_kv,
                    # The fused backward kernel has five matrix products instead of seven.
                    use_fused_bwd_kernel=True,
                ),
                head_shards=1,
                q_seq_shards=1,
                residual_checkpoint_name="attention",
                interpret=self.kernel == "splash_interpret",
            )
            return jax.vmap(kernel)(query, key, value, splash.SegmentIds(q_ids, kv_ids))

        scaled = query * jnp.asarray(query.shape[3] ** -0.5, query.dtype)
        arrays = (
            pad(scaled, padded),
            pad(key, kv_padded),
            pad(value, kv_padded),
            pad_ids(length, padded),
            pad_ids(kv_length, kv_padded),
        )
        if self.mesh is not None:
            shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            # Batches that are not divisible, such as a small evaluation batch, are replicated.
            rows = ("data", "fsdp") if query.shape[0] % shards == 0 else None
            heads_spec, ids_spec = PartitionSpec(rows, "tensor"), PartitionSpec(rows)
            per_device = jax.shard_map(
                per_device,
                mesh=self.mesh,
                in_specs=(heads_spec, heads_spec, heads_spec, ids_spec, ids_spec),
                out_specs=heads_spec,
                check_vma=False,
            )
        return per_device(*arrays)[:, :, :length].swapaxes(1, 2)


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
        return AttentionKernel(kernel, fall_back=True, mesh=mesh if kernel == "splash" else None)
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(name, platform)
    if needs != platform:
        raise UserError(
            f"config.model.attention={name} needs a {needs}, this platform is {platform}; "
            "choose auto or xla"
        )
    return AttentionKernel(name, mesh=mesh if name.startswith("splash") else None)
