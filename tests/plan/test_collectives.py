"""Reading compiled programs: loops, what is sent between chips and how long it takes at best, and memory traffic."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fastslm_jax import chips, sharding
from fastslm_jax.plan import collectives, hlo

# As the TPU compiler writes: a loop without a trip count, a gather spread over two fusions, a reduce-scatter as a fusion.
PROGRAM = """\
HloModule step, is_scheduled=true

%start (p: bf16[64,32]) -> (bf16[64,32], bf16[128,32]) {
  %p = bf16[64,32]{1,0} parameter(0)
  %ag.1 = bf16[128,32]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  ROOT %t = (bf16[64,32]{1,0}, bf16[128,32]{1,0}) tuple(%p, %ag.1)
}

%end (q: bf16[64,32]) -> bf16[128,32] {
  %q = bf16[64,32]{1,0} parameter(0)
  ROOT %ag.2 = bf16[128,32]{1,0:S(1)} all-gather(%q), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
}

%all-reduce-scatter.3 (r: f32[128]) -> f32[32] {
  %r = f32[128]{0} parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[128]{0} all-reduce(%r), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[32]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={32}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%condition (c: (s32[], bf16[64,32])) -> pred[] {
  %c = (s32[], bf16[64,32]{1,0}) parameter(0)
  %limit = s32[] constant(36)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%body (s: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %s = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = bf16[64,32]{1,0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %began = (bf16[64,32]{1,0}, bf16[128,32]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %whole = bf16[128,32]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%end
  %kernel = f32[4]{0} custom-call(%whole), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
}}, metadata={op_name="over two lines"}
  ROOT %out = (s32[], bf16[64,32]{1,0}) tuple(%next, %w)
}

ENTRY %main (w0: bf16[64,32], g: f32[128]) -> f32[32] {
  %w0 = bf16[64,32]{1,0} parameter(0)
  %g = f32[128]{0} parameter(1)
  %first = s32[] constant(0)
  %state = (s32[], bf16[64,32]{1,0}) tuple(%first, %w0)
  %loop = (s32[], bf16[64,32]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %shard = f32[32]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_loops_run_as_often_as_their_counter_says():
    program = hlo.Program(PROGRAM)
    runs = program.runs()
    assert (runs["main"], runs["body"], runs["start"]) == (1, 36, 36)
    known = 'body=%body, backend_config={"known_trip_count":{"n":"12"}}'
    assert hlo.Program(PROGRAM.replace("body=%body", known)).runs()["body"] == 12
    assert (
        hlo.Program(PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")).runs()[
            "body"
        ]
        == 18
    )
    assert (
        hlo.Program(
            PROGRAM.replace("%first = s32[] constant(0)", "%first = s32[] constant(6)")
        ).runs()["body"]
        == 30
    )


def test_a_loop_without_an_end_is_an_error():
    program = hlo.Program(PROGRAM.replace("direction=LT", "direction=NE"))
    with pytest.raises(
        ValueError, match="the loop loop of the compiled program has no known trip count"
    ):
        program.runs()


def test_collectives_are_counted_once_with_their_loop():
    found = {c.kind: c for c in collectives.find(hlo.Program(PROGRAM), 4)}
    assert set(found) == {"all-gather", "reduce-scatter"}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.runs, gather.result, gather.groups) == (36, 128 * 32 * 2, ((0, 1), (2, 3)))
    assert gather.sent == 128 * 32 * 2 / 2
    assert (scatter.runs, scatter.result, scatter.groups) == (1, 32 * 4, ((0, 1, 2, 3),))
    assert scatter.sent == 3 / 4 * 128 * 4


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
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8] parameter(0)\n  ROOT %a = f32[8] all-reduce(%p), {attributes}\n}}\n"
    (found,) = collectives.find(hlo.Program(text), 4)
    assert found.groups == groups


def test_a_compiled_program_sends_what_its_shardings_say():
    """Five layers whose weights [5, 16, 16] lie over fsdp 4: each is gathered once in the loop."""
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
    assert sum(c.runs * c.sent for c in found) == 5 * 16 * 16 * 4 * 3 / 4
    assert {len(c.groups) for c in found} == {2}


# ----------------------------------------------------------------------------------------------------------------- time

V5E = chips.parse_topology("v5e:4x4").chip
V5P = chips.parse_topology("v5p:4x4x4").chip


def device(*coords, slice_index=0):
    return types.SimpleNamespace(coords=list(coords), slice_index=slice_index)


def gather(size, result=16e9):
    return collectives.Collective("all-gather", "g", 1, result, (tuple(range(size)),))


def test_time_over_the_links_of_the_axes_that_a_group_spans():
    square = [device(x, y, 0) for x in range(4) for y in range(4)]
    # v5e 4x4 does not close to a ring: one direction of an axis, 50 GB/s; all sixteen chips span both axes.
    assert collectives.seconds(gather(4), square, V5E) == {
        "ici": pytest.approx(12e9 / 50e9),
        "dcn": 0,
    }
    assert collectives.seconds(gather(16), square, V5E) == {
        "ici": pytest.approx(15e9 / 100e9),
        "dcn": 0,
    }
    cube = [device(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    assert collectives.seconds(gather(4), cube, V5P) == {
        "ici": pytest.approx(12e9 / 200e9),
        "dcn": 0,
    }
    assert collectives.seconds(gather(64), cube, V5P) == {
        "ici": pytest.approx(15.75e9 / 600e9),
        "dcn": 0,
    }


def test_time_between_slices():
    """Two slices of two chips reduce 4 GB: 2 · 2 GB within a slice, 2 · 1 GB of each chip's half between them."""
    two = [device(x, 0, 0, slice_index=number) for number in range(2) for x in range(2)]
    reduce = collectives.Collective("all-reduce", "r", 1, 4e9, ((0, 1, 2, 3),))
    assert reduce.sent == pytest.approx(6e9)
    assert collectives.seconds(reduce, two, V5E) == {
        "ici": pytest.approx(4e9 / 50e9),
        "dcn": pytest.approx(2e9 / V5E.dcn_bandwidth),
    }


def test_what_slices_exchange_goes_through_their_hosts():
    text = """\
ENTRY %main (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  %after = token[] after-all()
  %send = (f32[1000]{0}, u32[], token[]) send(%p, %after), attributes={name="xla_megascale_runtime"}
  %near = (f32[1000]{0}, u32[], token[]) send(%p, %after), channel_id=4
  ROOT %out = f32[1000]{0} negate(%p)
}
"""
    (found,) = collectives.find(hlo.Program(text), 2, slices=4)
    assert (found.kind, found.sent) == ("between slices", 2 * 3 / 4 * 4000)
    two = [device(x, 0, 0) for x in range(2)]
    assert collectives.seconds(found, two, V5E) == {
        "ici": 0,
        "dcn": pytest.approx(6000 / V5E.dcn_bandwidth),
    }


# -------------------------------------------------------------------------------------------------------------- traffic


def test_traffic_counts_what_is_read_and_written_in_main_memory():
    """A loop of four that updates a slice of [4, 100] in place from a slice of [4, 100]: 400 bytes in and 400 out each time; and
    a result in on-chip memory, which costs its reading only."""
    text = """\
%update (a: f32[4,100], b: f32[4,100], i: s32[]) -> f32[4,100] {
  %a = f32[4,100]{1,0} parameter(0)
  %b = f32[4,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %part = f32[1,100]{1,0} dynamic-slice(%b, %i, %z), dynamic_slice_sizes={1,100}
  ROOT %new = f32[4,100]{1,0} dynamic-update-slice(%a, %part, %i, %z)
}

%condition (c: (s32[], f32[4,100], f32[4,100])) -> pred[] {
  %c = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%body (s: (s32[], f32[4,100], f32[4,100])) -> (s32[], f32[4,100], f32[4,100]) {
  %s = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %a = f32[4,100]{1,0} get-tuple-element(%s), index=1
  %b = f32[4,100]{1,0} get-tuple-element(%s), index=2
  %updated = f32[4,100]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%update
  ROOT %out = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) tuple(%i, %updated, %b)
}

ENTRY %main (s0: (s32[], f32[4,100], f32[4,100])) -> f32[4,100] {
  %s0 = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) parameter(0)
  %loop = (s32[], f32[4,100], f32[4,100]) while(%s0), condition=%condition, body=%body, config={"known_trip_count":{"n":"4"}}
  %a = f32[4,100]{1,0} get-tuple-element(%loop), index=1
  ROOT %near = f32[4,100]{1,0:S(1)} negate(%a)
}
"""
    scalar = 4  # the loop's counter, read by the fusion
    assert hlo.traffic(hlo.Program(text)) == 4 * (400 + 400 + scalar) + 1600
