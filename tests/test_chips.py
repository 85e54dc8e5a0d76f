"""Parsing of TPU topologies, and the lookup of a chip by its device."""

import pytest

from fastslm_jax import chips
from fastslm_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "chip", "shape", "slices", "count"),
    [
        ("v5e:4x4", "v5e", (4, 4), 1, 16),
        ("v5e:16x16x2", "v5e", (16, 16), 2, 512),
        ("v5p:8x8x16", "v5p", (8, 8, 16), 1, 1024),
        ("v5p:4x4x4x3", "v5p", (4, 4, 4), 3, 192),
    ],
)
def test_parse_topology(text, chip, shape, slices, count):
    topology = chips.parse_topology(text)
    assert (topology.chip.name, topology.shape, topology.slices, topology.chips) == (
        chip,
        shape,
        slices,
        count,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "v9:4x4",
            r"--topology=v9:4x4: unknown TPU 'v9'; valid topologies are v5e:4x4, v5p:4x4x4",
        ),
        ("v5e", r"--topology=v5e: expected a shape such as v5e:4x4; supported slices are 1x1, 2x2"),
        ("v5e:4x0", "expected a shape such as v5e:4x4"),
        ("v5p:4x4", "a v5p slice has 3 dimensions, optionally followed by the number of slices"),
        ("v5e:5x7", "there is no v5e:5x7 slice; the nearest are v5e:4x8 and v5e:8x8"),
    ],
)
def test_invalid_topologies(text, message):
    with pytest.raises(UserError, match=message) as error:
        chips.parse_topology(text)
    assert "\n" not in str(error.value)


def test_of_device():
    class Device:
        device_kind = "TPU v5 lite"

    assert chips.of_device(Device()).name == "v5e"
    Device.device_kind = "cpu"
    assert chips.of_device(Device()) is None
