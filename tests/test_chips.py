"""Parsing of topologies, and the lookup of a chip by its device."""

import importlib.resources
import importlib.util
import re

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
    ("text", "chip", "gpus", "nodes", "count"),
    [
        ("h100:8", "H100", 8, 1, 8),
        ("h100:8x32", "H100", 8, 32, 256),
        ("a100-80:1", "A100-80GB", 1, 1, 1),
        ("h200:4", "H200", 4, 1, 4),
        ("b200:8x2", "B200", 8, 2, 16),
        ("gb200:72", "GB200", 72, 1, 72),
        ("l4:1", "L4", 1, 1, 1),
    ],
)
def test_parse_gpu_topology(text, chip, gpus, nodes, count):
    topology = chips.parse_topology(text)
    assert (topology.chip.name, topology.gpus, topology.nodes) == (chip, gpus, nodes)
    assert (topology.chips, topology.name) == (count, text)


@pytest.mark.parametrize("chip", [chip for chip in chips.CHIPS if chip.target])
def test_target_files_agree_with_the_table(chip):
    """Memory and its bandwidth within 1.2 %, and the name by which JAX calls the card."""
    target = importlib.resources.files("fastslm_jax") / f"targets/{chip.target}.txtpb"
    fields = dict(re.findall(r"(\w+): \"?([^\"\n]+)", target.read_text()))
    assert fields["device_description_str"] in chip.device_kinds
    assert int(fields["memory_bandwidth"]) == pytest.approx(chip.hbm_bandwidth, rel=0.01)
    assert int(fields["device_memory_size"]) == pytest.approx(chip.hbm_bytes, rel=0.012)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the plugin is installed"
)
def test_a_gpu_topology_without_the_plugin_is_one_line():
    message = r"compiling for a GPU requires JAX's CUDA plugin .*; run pip install -e .\[plan-gpu\]"
    with pytest.raises(UserError, match=message):
        chips.parse_topology("h100:8").devices()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "v9:4x4",
            r"--topology=v9:4x4: unknown TPU or GPU 'v9'; valid topologies are v5e:4x4, v5p:4x4x4, "
            r".*l4:8, a100-80:8, h100:8, h200:8, b200:8, gb200:72",
        ),
        ("v5e", r"--topology=v5e: expected a shape such as v5e:4x4; supported slices are 1x1, 2x2"),
        ("v5e:4x0", "expected a shape such as v5e:4x4"),
        ("v5p:4x4", "a v5p slice has 3 dimensions, optionally followed by the number of slices"),
        (
            "h100:16",
            "h100:16: expected the GPUs of a node, at most 8, and the number of nodes: h100:8 or "
            "h100:8x4",
        ),
        ("h100", "expected the GPUs of a node"),
        ("h100:8x0", "expected the GPUs of a node"),
        ("h100:8x2x2", "expected the GPUs of a node"),
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
