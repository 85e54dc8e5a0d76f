"""Attention by platform: one function over kernels that others keep well, and plain XLA where there is none.

| name             | kernel                                                             | runs on        |
|------------------|--------------------------------------------------------------------|----------------|
| xla              | plain operations of XLA that keep no scores (`xla_attention`)      | everywhere     |
| splash           | splash attention with segment ids (JAX's Pallas kernel for TPU)    | TPU            |
| cudnn            | `jax.nn.dot_product_attention(implementation="cudnn")`             | GPU, 16 bit    |
| splash_interpret | splash interpreted: what a machine without a TPU checks it with    | everywhere     |
| auto             | splash on TPU, cudnn on GPU in 16 bit, else xla                    | everywhere     |

With a named kernel, what it cannot take is an error. With "auto" it goes to xla, is logged once and counted in CHOICES.
Decoding from a key-value cache does not come here (see `kv_cache`): a query of one token is no work for these kernels.

Shapes: b batch, t query time, s key time, n query heads, k key-value heads (n a multiple of k), h head dimension.
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
BLOCKS = (512, 384, 256, 128)  # of splash attention: the largest that divides the padded length
CHOICES: collections.Counter[str] = (
    collections.Counter()
)  # "kernel, shapes[, reason]" → times traced


@flax.struct.dataclass
class CausalSegments:
    """A mask that is not written out: a token sees itself and earlier ones of its segment. segment_ids [b, t], or None."""

    segment_ids: jax.Array | None = None


class KernelError(UserError):
    """A kernel that cannot take what it was given."""


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """Scaled dot-product attention, called as attend(query, key, value, mask).

    kernel: one of NAMES but "auto" (see `choose`).
    fall_back: whether xla takes what the kernel cannot.
    mesh: the mesh that the arrays lie on. Splash attention needs it: XLA does not split a Pallas kernel over devices by itself.
    """

    kernel: str = "xla"
    fall_back: bool = False
    mesh: Mesh | None = None

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: CausalSegments | None = None
    ) -> jax.Array:
        """query [b, t, n, h], key and value [b, s, k, h] → [b, t, n, h].

        Raises:
            KernelError: the kernel cannot take the shapes or types, and may not fall back.
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
        """Why the kernel cannot take these arrays; "" if it can."""
        head_dim, heads, kv_heads = query.shape[3], query.shape[2], key.shape[2]
        if self.kernel.startswith("splash"):
            if head_dim % 64 and self.kernel == "splash":
                return f"heads of {head_dim}, splash attention takes multiples of 64"
            shards = 1 if self.mesh is None else self.mesh.shape["tensor"]
            if heads % shards or kv_heads % shards:
                return f"{heads} heads and {kv_heads} key-value heads do not divide over config.mesh.tensor={shards}"
        if self.kernel == "cudnn":
            if query.dtype not in (jnp.bfloat16, jnp.float16):
                return f"{query.dtype} arrays, cuDNN takes bfloat16 and float16"
            if head_dim % 8 or head_dim > 128:
                return f"heads of {head_dim}, cuDNN takes multiples of 8 up to 128"
        return ""

    def _count(self, kernel: str, query: jax.Array, key: jax.Array, reason: str) -> None:
        of = "x".join(map(str, query.shape))
        choice = f"{kernel}: queries {of}, {key.shape[1]} keys" + (f" ({reason})" if reason else "")
        CHOICES[choice] += 1
        if reason and CHOICES[choice] == 1:
            logging.warning("attention by %s", choice)

    def _splash(self, query, key, value, mask):
        length, kv_length = query.shape[1], key.shape[1]
        padded, kv_padded = (-(-size // 128) * 128 for size in (length, kv_length))

        def pad(x, size):
            return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)))

        def ids(size, total):
            given = getattr(mask, "segment_ids", None)
            given = jnp.zeros((query.shape[0], size), jnp.int32) if given is None else given
            return jnp.pad(
                given, ((0, 0), (0, total - size)), constant_values=-1
            )  # padding sees padding only

        def local(query, key, value, q_ids, kv_ids):
            shape = (padded, kv_padded)
            mask_of_head = (
                splash.CausalMask(shape)
                if isinstance(mask, CausalSegments)
                else splash.FullMask(shape)
            )
            block_q, block_kv = (
                next(size for size in BLOCKS if total % size == 0) for total in shape
            )
            kernel = splash.make_splash_mha(
                splash.MultiHeadMask([mask_of_head] * query.shape[1]),
                # One fused kernel for the backward pass: five matrix products instead of seven.
                block_sizes=splash.BlockSizes(
                    block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, use_fused_bwd_kernel=True
                ),
                head_shards=1,
                q_seq_shards=1,
                residual_checkpoint_name="attention",
                interpret=self.kernel == "splash_interpret",
            )  # fmt: skip
            return jax.vmap(kernel)(query, key, value, splash.SegmentIds(q_ids, kv_ids))

        scaled = query * jnp.asarray(query.shape[3] ** -0.5, query.dtype)
        arrays = (
            pad(scaled, padded),
            pad(key, kv_padded),
            pad(value, kv_padded),
            ids(length, padded),
            ids(kv_length, kv_padded),
        )
        if self.mesh is not None:
            shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            rows = (
                ("data", "fsdp") if query.shape[0] % shards == 0 else None
            )  # a small batch of an evaluation runs everywhere
            of_heads, of_ids = PartitionSpec(rows, "tensor"), PartitionSpec(rows)
            local = jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(of_heads, of_heads, of_heads, of_ids, of_ids),
                out_specs=of_heads,
                check_vma=False,
            )
        return local(*arrays)[:, :, :length].swapaxes(1, 2)


def choose(name: str, platform: str, dtype: jnp.dtype, mesh: Mesh | None = None) -> AttentionKernel:
    """config.model.attention → the kernel for a platform ("cpu", "tpu" or "gpu") and a type of computation.

    Raises:
        UserError: an unknown name, or a kernel that the platform does not have.
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
            f"config.model.attention={name} runs on {needs}, here is {platform}; choose auto or xla"
        )
    return AttentionKernel(name, mesh=mesh if name.startswith("splash") else None)
