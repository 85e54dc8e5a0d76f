"""Names of TPU topologies, and what is said about those that there are not."""

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
def test_topologies(text, chip, shape, slices, count):
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
            r"--topology=v9:4x4: v9 is no chip with a table in chips.py; write for example v5e:4x4, v5p:4x4x4",
        ),
        ("v5e", r"--topology=v5e: sizes are written like v5e:4x4; slices are 1x1, 2x2"),
        ("v5e:4x0", "sizes are written like v5e:4x4"),
        ("v5p:4x4", "v5p has slices of 3 axes, and after them their number"),
        ("v5e:5x7", "v5e has no slice of 5x7; the nearest are v5e:4x8 and v5e:8x8"),
    ],
)
def test_topologies_that_there_are_not(text, message):
    with pytest.raises(UserError, match=message) as error:
        chips.parse_topology(text)
    assert "\n" not in str(error.value)


def test_a_chip_is_known_by_its_device():
    class Device:
        device_kind = "TPU v5 lite"

    assert chips.of_device(Device()).name == "v5e"
    Device.device_kind = "cpu"
    assert chips.of_device(Device()) is None
