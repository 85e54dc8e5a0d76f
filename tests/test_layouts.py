"""Training on one device equals training on two processes: losses and every gradient.

FASTSLM_ALL_LAYOUTS=1 also runs meshes of eight devices, which takes a few minutes.
"""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow
SCRIPT = pathlib.Path(__file__).parent / "layouts.py"
MESHES = ("8x1x1", "1x8x1", "1x4x2", "2x2x2") if os.environ.get("FASTSLM_ALL_LAYOUTS") else ()
STAGES = ("1 short", "2 long", "3 mixed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{layout: {stage: losses, "stage|parameter": gradient}}."""
    out = tmp_path_factory.mktemp("layouts")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    commands = [[",".join(("1", *MESHES))], ["0", str(port)], ["1", str(port)]]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, out, *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        for process in processes:
            _, log = process.communicate(timeout=1500)
            assert process.returncode == 0, log[-2000:]
    finally:
        for process in processes:
            process.kill()
    return {file.stem: dict(np.load(file)) for file in out.glob("*.npz")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*MESHES, "two processes"])
def test_a_layout_matches_one_device(results, name, stage):
    one, other = results["1"], results[name]
    assert set(one) == set(other)
    np.testing.assert_allclose(other[stage][0], one[stage][0], rtol=1e-5)
    np.testing.assert_allclose(other[stage], one[stage], rtol=1e-4)
    gradients = [key for key in one if key.startswith(f"{stage}|")]
    assert len(gradients) > 40
    for key in gradients:
        np.testing.assert_allclose(
            other[key], one[key], atol=1e-5 * np.abs(one[key]).max(), rtol=0, err_msg=key
        )


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_decreases(results, stage):
    losses = results["1"][stage]
    assert len(losses) == 20
    assert losses[-3:].mean() < losses[:3].mean() - 0.05
