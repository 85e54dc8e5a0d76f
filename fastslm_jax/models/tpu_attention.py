"""Attention on TPUs: Pallas kernels, each run per device, since XLA cannot partition them.

Shapes: b batch, t query time, s key time, n query heads, k key-value heads, h head dimension.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from fastslm_jax.models import paired_attention, rotary_kernel
from fastslm_jax.models.attention_arrays import CausalSegments, pad, segment_ids, shard

MULTIPLE = 128  # of the lengths of queries and keys
# Blocks of splash attention; the largest one that divides the padded length is used.
BLOCKS = (512, 384, 256, 128)


@dataclasses.dataclass(frozen=True)
class TPUAttention:
    """Two heads of 64 at a time without a mask; else splash attention (JAX's Pallas kernel).

    mesh: of the inputs.
    interpret: Pallas's interpret mode, for tests without a TPU.
    """

    mesh: Mesh | None
    interpret: bool

    def _head_shards(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["tensor"]

    def rotates(self, query: jax.Array, key: jax.Array, head_dim: int) -> bool:
        """Whether `rotate` takes query [b, t, n · h] and key [b, s, k · h]."""
        shards = self._head_shards()
        return all(
            rotary_kernel.supports(x, head_dim) and x.shape[2] % (shards * head_dim) == 0
            for x in (query, key)
        )

    def rotate(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        epsilon: float,
        factor: float,
    ) -> jax.Array:
        """`rotary_kernel.norm_and_rotate`, per device: x [b, t, n · h] → [b, t, n, h]."""

        def per_device(
            x: jax.Array, cos: jax.Array, sin: jax.Array, scale: jax.Array | None = None
        ) -> jax.Array:
            return rotary_kernel.norm_and_rotate(
                x, scale, cos, sin, epsilon, factor, self.interpret
            )

        # A scale per row, so that it is sharded like the others.
        scales = () if scale is None else (jnp.broadcast_to(scale, (len(x), 1, len(scale))),)
        axes = ((None, "tensor"), (), (), ())[: 3 + len(scales)]
        rotated = shard(self.mesh, per_device, axes, ("tensor",))(x, cos, sin, *scales)
        return rotated.swapaxes(1, 2)

    def attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: CausalSegments | None,
        keys: int | None,
        is_scaled: bool,
    ) -> jax.Array:
        """See `attention.AttentionKernel`."""
        by_head = functools.partial(self._by_head, mask=mask, keys=keys, is_scaled=is_scaled)
        shards = self._head_shards()
        if mask is not None or not paired_attention.supports(query, key, shards):
            return by_head(query, key, value)
        keys = key.shape[1] if keys is None else keys
        attend = jax.custom_vjp(functools.partial(self._paired, keys))

        def backward(arrays: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
            if paired_attention.has_backward(query):
                return self._paired(keys, *arrays, gradient)
            return jax.vjp(by_head, *arrays)[1](gradient)

        attend.defvjp(lambda *arrays: (attend(*arrays), arrays), backward)
        return attend(query, key, value)

    def _paired(self, keys: int, *arrays: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """Query, key, value [b, t or s, n, h] → output; with its gradient → their gradients."""
        kernel = paired_attention.forward if len(arrays) == 3 else paired_attention.backward
        columns = (None, "tensor")
        out_axes = columns if len(arrays) == 3 else (columns,) * 3
        run = functools.partial(kernel, keys=keys, interpret=self.interpret)
        flat = (x.reshape(*x.shape[:2], -1) for x in arrays)
        out = shard(self.mesh, run, (columns,) * len(arrays), out_axes)(*flat)
        return jax.tree.map(lambda x: x.reshape(*x.shape[:2], *arrays[0].shape[2:]), out)

    def _by_head(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: CausalSegments | None,
        keys: int | None,
        is_scaled: bool,
    ) -> jax.Array:
        length = query.shape[1]

        def per_device(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            q_ids: jax.Array,
            kv_ids: jax.Array,
        ) -> jax.Array:
            shape = (query.shape[2], key.shape[2])
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
                interpret=self.interpret,
            )
            return jax.vmap(kernel)(query, key, value, splash.SegmentIds(q_ids, kv_ids))

        if not is_scaled:
            query = query * jnp.asarray(query.shape[3] ** -0.5, query.dtype)
        arrays = (pad(x.swapaxes(1, 2), 2, MULTIPLE) for x in (query, key, value))
        ids = (segment_ids(mask, x) for x in (query, key[:, :keys]))
        ids = (pad(x, 1, MULTIPLE, -1) for x in ids)
        heads = ("tensor",)
        out = shard(self.mesh, per_device, (heads, heads, heads, (), ()), heads)(*arrays, *ids)
        return out[:, :, :length].swapaxes(1, 2)
