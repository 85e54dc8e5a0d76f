"""HBM traffic of a compiled program."""

import pytest

from fastslm_jax.plan import hlo, traffic

TEXT = """\
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
  %loop = (s32[], f32[4,100], f32[4,100]) while(%s0), condition=%condition, body=%body, TRIPS
  %a = f32[4,100]{1,0} get-tuple-element(%loop), index=1
  ROOT %near = f32[4,100]{1,0:S(1)} negate(%a)
}
""".replace("TRIPS", 'config={"known_trip_count":{"n":"4"}}')


def test_hbm_traffic():
    """A loop that copies a slice of 400 bytes, in place; then a result in on-chip memory."""
    counter = 4  # read by the fusion
    loop = 4 * (400 + 400 + counter)
    negate = 1600  # read from HBM, written on chip
    assert traffic.hbm_traffic(hlo.Program(TEXT)) == loop + negate


def test_instructions_are_sorted_by_what_they_move():
    entries = traffic.by_instruction(hlo.Program(TEXT))
    found = [(entry.instruction.name, entry.count, entry.bytes_moved) for entry in entries]
    assert found == [("updated", 4, 804), ("near", 1, 1600)]


def test_static_slices_and_workspaces():
    """A slice reads what it returns; a cuBLAS product does not write its workspace."""
    text = """\
ENTRY %main (w: bf16[36,64,64], x: bf16[8,64]) -> bf16[8,64] {
  %w = bf16[36,64,64]{2,1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %layer = bf16[1,64,64]{2,1,0} slice(%w), slice={[3:4], [0:64], [0:64]}
  %y = (bf16[8,64]{1,0}, s8[4194304]{0}) custom-call(%x, %layer), custom_call_target="__cublas$gemm"
  ROOT %out = bf16[8,64]{1,0} get-tuple-element(%y), index=0
}
"""
    layer, rows = 64 * 64 * 2, 8 * 64 * 2
    assert traffic.hbm_traffic(hlo.Program(text)) == 2 * layer + (rows + layer + rows)


def test_allocations_and_copies_to_on_chip_memory():
    """Allocating moves nothing. A copy reads its operand once and writes nothing to HBM."""
    text = """\
ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %room = f32[36,100]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[100]{0:S(1)} copy-done(%start)
  ROOT %out = f32[100]{0} negate(%near)
}
"""
    assert traffic.hbm_traffic(hlo.Program(text)) == 400 + 400


@pytest.mark.parametrize(
    ("array", "moved"),
    [
        ("%a = f32[16,100]{1,0} parameter(0)", 2 * 400 + 4),  # in place: the rows and their index
        ("%a = f32[16,100]{1,0} broadcast(%zero), dimensions={}", 6400 + 400 + 4),
    ],
    ids=["stored", "computed"],
)
def test_a_scatter_writes_its_rows_in_place(array, moved):
    text = f"""\
%rows (p: f32[16,100], u: f32[1,100], i: s32[1,1]) -> f32[16,100] {{
  %p = f32[16,100]{{1,0}} parameter(0)
  %zero = f32[] constant(0)
  {array}
  %u = f32[1,100]{{1,0}} parameter(1)
  %i = s32[1,1]{{1,0}} parameter(2)
  ROOT %out = f32[16,100]{{1,0}} scatter(%a, %i, %u), to_apply=%second
}}

ENTRY %main (p: f32[16,100], u: f32[1,100], i: s32[1,1]) -> f32[16,100] {{
  %p = f32[16,100]{{1,0}} parameter(0)
  %u = f32[1,100]{{1,0}} parameter(1)
  %i = s32[1,1]{{1,0}} parameter(2)
  ROOT %out = f32[16,100]{{1,0}} fusion(%p, %u, %i), kind=kInput, calls=%rows
}}
"""
    assert traffic.hbm_traffic(hlo.Program(text)) == moved
