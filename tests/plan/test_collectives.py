"""Collectives of compiled programs: executions, groups, bytes and time."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fastslm_jax import chips, sharding
from fastslm_jax.plan import collectives, hlo

V5E = chips.parse_topology("v5e:4x4").chip
V5P = chips.parse_topology("v5p:4x4x4").chip


def test_a_split_collective_is_counted_once_per_trip(hlo_text):
    found = {c.kind: c for c in collectives.find(hlo.Program(hlo_text), 4)}
    assert set(found) == {"all-gather", "reduce-scatter"}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.count, gather.result_bytes) == (36, 128 * 32 * 2)
    assert gather.groups == ((0, 1), (2, 3))
    assert gather.bytes_sent == 128 * 32 * 2 / 2
    assert gather.bytes_per_step == 36 * gather.bytes_sent
    assert (scatter.count, scatter.result_bytes) == (1, 32 * 4)
    assert scatter.groups == ((0, 1, 2, 3),)
    assert scatter.bytes_sent == 3 / 4 * 128 * 4


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("channel_id=1", ((0, 1, 2, 3),)),
    ],
)
def test_groups(attributes, groups):
    text = f"""\
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %a = f32[8] all-reduce(%p), {attributes}
}}
"""
    (found,) = collectives.find(hlo.Program(text), 4)
    assert found.groups == groups


def test_scanned_weights_are_gathered_once_per_layer():
    """Weights [5, 16, 16] of five layers, sharded over fsdp = 4."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def apply(w, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)[0]

    step = jax.jit(apply, in_shardings=(weights, rows), out_shardings=rows)
    shapes = (
        jax.ShapeDtypeStruct((5, 16, 16), jnp.float32),
        jax.ShapeDtypeStruct((8, 16), jnp.float32),
    )
    program = hlo.Program(step.lower(*shapes).compile().as_text())
    found = collectives.find(program, 8)
    assert {c.kind for c in found} == {"all-gather"}
    assert sum(c.bytes_per_step for c in found) == 5 * 16 * 16 * 4 * 3 / 4
    assert {len(c.groups) for c in found} == {2}


# ----------------------------------------------------------------------------------------- time


def device(*coords, slice_index=0):
    return types.SimpleNamespace(coords=list(coords), slice_index=slice_index)


def gather_16_gb(group_size):
    return collectives.Collective("all-gather", "g", 1, 16e9, (tuple(range(group_size)),))


@pytest.mark.parametrize(
    ("group_size", "bandwidth"),
    # Without wraparound links, half of 100 GB/s per axis. The 16 chips span both axes.
    [(4, 50e9), (16, 100e9)],
)
def test_time_on_a_v5e_slice_without_wraparound(group_size, bandwidth):
    square = [device(x, y, 0) for x in range(4) for y in range(4)]
    sent = 16e9 * (group_size - 1) / group_size
    times = collectives.seconds(gather_16_gb(group_size), square, V5E)
    assert times == {"ici": pytest.approx(sent / bandwidth), "dcn": 0}


@pytest.mark.parametrize(
    ("group_size", "bandwidth"),
    # Every axis is a ring of 200 GB/s. The 64 chips span all three axes.
    [(4, 200e9), (64, 600e9)],
)
def test_time_on_a_v5p_slice_with_wraparound(group_size, bandwidth):
    cube = [device(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    sent = 16e9 * (group_size - 1) / group_size
    times = collectives.seconds(gather_16_gb(group_size), cube, V5P)
    assert times == {"ici": pytest.approx(sent / bandwidth), "dcn": 0}


def test_time_across_slices():
    """Two slices of two chips all-reduce 4 GB: 4 GB over ICI, then 2 GB of each shard over DCN."""
    devices = [device(x, 0, 0, slice_index=number) for number in range(2) for x in range(2)]
    reduce = collectives.Collective("all-reduce", "r", 1, 4e9, ((0, 1, 2, 3),))
    assert reduce.bytes_sent == pytest.approx(6e9)
    assert collectives.seconds(reduce, devices, V5E) == {
        "ici": pytest.approx(4e9 / 50e9),
        "dcn": pytest.approx(2e9 / V5E.dcn_bandwidth),
    }


def test_megascale_sends_use_dcn():
    text = """\
ENTRY %main (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[1000]{0}, u32[], token[]) send(%p, %after), attributes={name="xla_megascale_runtime"}
  %near = (f32[1000]{0}, u32[], token[]) send(%p, %after), channel_id=4
  ROOT %out = f32[1000]{0} negate(%p)
}
"""
    (found,) = collectives.find(hlo.Program(text), 2, num_slices=4)
    assert (found.kind, found.bytes_sent) == ("between slices", 2 * 3 / 4 * 4000)
    devices = [device(x, 0, 0) for x in range(2)]
    assert collectives.seconds(found, devices, V5E) == {
        "ici": 0,
        "dcn": pytest.approx(6000 / V5E.dcn_bandwidth),
    }
