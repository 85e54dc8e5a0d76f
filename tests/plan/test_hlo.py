"""Parsing HLO, and the trip counts of loops."""

import pytest

from fastslm_jax.plan import hlo


def test_shape_bytes_separates_on_chip_memory():
    text = "(bf16[2,3]{1,0}, f32[4]{0:S(1)}, s4[4], token[])"
    assert hlo.shape_bytes(text) == ([12, 16, 2, 0], [12, 0, 2, 0])


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ("f32[3,64]{1,0:T(8,128)}", 8 * 128 * 4),
        ("f32[3,64]{0,1:T(8,128)}", 128 * 64 * 4),  # transposed: 3 is the minor dimension
        ("bf16[2,20,1500,64]{3,2,1,0:T(8,128)(2,1)}", 2 * 20 * 1504 * 128 * 2),
        ("f32[5]{0:T(1024)}", 1024 * 4),
        ("f32[]{:T(128)}", 4),
        ("f32[3,64]{1,0:T(8,128)S(1)}", 0),
    ],
)
def test_tiles_of_a_tpu_are_padded(shape, stored):
    assert hlo.shape_bytes(shape)[1] == [stored]


def test_a_loop_body_runs_once_per_trip(hlo_text):
    counts = hlo.Program(hlo_text).execution_counts()
    assert (counts["main"], counts["body"], counts["start"]) == (1, 36, 36)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"}}', 12),
        ("%one = s32[] constant(1)", "%one = s32[] constant(2)", 18),
        ("%first = s32[] constant(0)", "%first = s32[] constant(6)", 30),
    ],
    ids=["annotation", "step", "start"],
)
def test_trip_count(hlo_text, old, new, expected):
    program = hlo.Program(hlo_text.replace(old, new))
    assert program.execution_counts()["body"] == expected


def test_an_unknown_trip_count_is_an_error(hlo_text):
    program = hlo.Program(hlo_text.replace("direction=LT", "direction=NE"))
    with pytest.raises(ValueError, match="the trip count of the HLO loop loop is unknown"):
        program.execution_counts()
    assert program.execution_counts(unknown_trips=5)["body"] == 5


def test_the_source_of_an_instruction_is_the_innermost_line_of_the_package():
    """Frame 3 is in JAX; frame 2, which called it, is ours. Parents are printed plus one."""
    text = """\
HloModule step

FileNames
1 "/home/me/train.py"
2 "/home/me/fastslm_jax/models/lora.py"
3 "/venv/jax/lax.py"

FunctionNames
1 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=1}
2 {file_name_id=2 function_name_id=1 line=53 end_line=53 column=1 end_column=1}
3 {file_name_id=3 function_name_id=1 line=7 end_line=7 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} negate(%p), metadata={op_name="a" stack_frame_id=3}
  ROOT %b = f32[8]{0} negate(%a), metadata={op_name="b" stack_frame_id=1}
}
"""
    program = hlo.Program(text)
    sources = [program.source(instruction) for instruction in program.computations["main"]]
    assert sources == ["", "models/lora.py:53", ""]


def test_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.Program("func.func @main()")
