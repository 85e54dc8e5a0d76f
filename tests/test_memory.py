"""Bytes by kind, and the one check that something fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastslm_jax import memory, sharding


def test_bytes_of_the_fullest_device():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharded = jax.ShapeDtypeStruct(
        (2, 32, 64), np.float32, sharding=NamedSharding(mesh, P(None, "fsdp", "tensor"))
    )
    replicated = jax.ShapeDtypeStruct((10,), np.int16, sharding=NamedSharding(mesh, P()))
    assert memory.bytes_per_device({"a": sharded, "b": [replicated]}) == 4 * 2 * 16 * 32 + 20


def test_kv_cache_of_eight_hours_of_speech():
    """Qwen3-4B in bfloat16 takes 144 KiB a token, so 48 000 speech tokens take 6.6 GiB."""
    sizes = {"layers": 36, "rows": 1, "length": 48_000, "kv_heads": 8, "head_dim": 128}
    assert memory.kv_cache_bytes(**sizes, dtype=jnp.bfloat16) == 48_000 * 144 * 1024
    quantized = memory.kv_cache_bytes(**sizes, dtype=jnp.int8)
    assert quantized == 48_000 * (72 * 1024 + 2 * 36 * 8 * 4)


def test_a_step_that_does_not_fit_lists_its_parts():
    parts = {"frozen": 3 << 30, "batch": 1 << 29}
    memory.check("a step", parts, 4 << 30, lambda: pytest.fail("it fits"))
    memory.check("a step", parts, None, lambda: pytest.fail("the capacity is unknown"))
    with pytest.raises(memory.CapacityError) as raised:
        memory.check("a step", parts, 2 << 30, lambda: "use more devices")
    assert str(raised.value) == (
        "a step needs at least 3.50 GiB per device (frozen 3.00, batch 0.50), "
        "available are 2.00 GiB; use more devices"
    )
