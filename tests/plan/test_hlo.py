"""Parsing HLO, and the trip counts of loops."""

import pytest

from fastslm_jax.plan import hlo


def test_shape_bytes_separates_on_chip_memory():
    text = "(bf16[2,3]{1,0}, f32[4]{0:S(1)}, s4[4], token[])"
    assert hlo.shape_bytes(text) == ([12, 16, 2, 0], [12, 0, 2, 0])


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


def test_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.Program("func.func @main()")
