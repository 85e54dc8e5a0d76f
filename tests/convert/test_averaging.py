"""The average of the last checkpoints: values, provenance, and what must be equal."""

import json
import shutil

import jax
import numpy as np
import pytest

from fastslm_jax.convert import opening
from fastslm_jax.training.checkpoint import Checkpoints


@pytest.fixture
def trained(make_workdir, tmp_path):
    """trained({step: changes of its meta}, shift) → a run, and its parameters as of step 0.

    Each trained parameter is larger by 1/3 of the step; in the last step, frozen ones by `shift`.
    """
    workdir = make_workdir(tmp_path / "run")
    given = opening.open_workdir(workdir)
    params = {path: given.leaves[path] for path in given.meta["checksums"]["params"]}

    def train(changes: dict[int, dict], shift: float = 0.0):
        checkpoints = Checkpoints(workdir, keep=5)
        for step, change in changes.items():
            moved = shift if step == max(changes) else 0.0
            grown = {
                path: leaf + np.float32(moved if "positions" in path else step / 3)
                for path, leaf in params.items()
            }
            meta = {name: given.meta[name] for name in ("config", "row", "bases")} | change
            checkpoints.save(step, jax.device_put(grown), {"step": np.int32(step)}, meta)
        checkpoints.close()
        return workdir, params

    return train


def test_the_mean_of_the_trained_parameters(trained, convert, tmp_path):
    workdir, params = trained({10: {}, 20: {}, 40: {}})
    done = convert("average", f"--workdir={workdir}", f"--out={tmp_path}/mean", "--last=3")
    assert f"{workdir} → {tmp_path}/mean: step 0, the mean of steps 10, 20, 40" in done.stdout
    assert done.json["steps"] == [10, 20, 40]

    mean = opening.open_workdir(tmp_path / "mean")
    assert mean.step == 0
    assert mean.meta["averaged"] == {"from": str(workdir), "steps": [10, 20, 40]}
    assert list(mean.meta["checksums"]) == ["params"]  # no optimizer state
    assert json.loads((tmp_path / "mean/config.json").read_text())["name"] == "small"
    averaged = [path for path in params if "positions" not in path]
    assert done.json["tensors"] == len(averaged)
    for path, leaf in params.items():
        is_averaged = path in averaged
        growth = np.float64(70 / 9) if is_averaged else 0  # (10 + 20 + 40) / 3 / 3
        assert mean.leaves[path].dtype == np.float32
        np.testing.assert_allclose(
            mean.leaves[path], leaf + growth, rtol=0, atol=2e-6 * is_averaged
        )


def test_what_must_be_equal(trained, convert, tmp_path):
    def error(last: int) -> str:
        arguments = (f"--workdir={workdir}", f"--out={tmp_path}/mean", f"--last={last}")
        (line,) = convert("average", *arguments, fails=True).stderr.splitlines()
        assert not (tmp_path / "mean").exists()
        return line

    workdir, _ = trained({10: {}})
    config = Checkpoints(workdir, read_only=True).meta(10)["config"]
    config["model"]["lora"]["alpha"] = 9.0
    changes = {20: {"bases": {"whisper": "a", "llm": "b"}}, 30: {"config": config}, 40: {}, 50: {}}
    trained(changes, shift=1e-3)
    assert error(2).endswith(
        f"{workdir}/checkpoints: the frozen parameter hfq_former/compressor_1/context_positions of "
        "step 50 differs from that of step 40; average fewer checkpoints"
    )
    assert error(3).endswith(
        f"{workdir}: config.model of step 30 differs from that of step 50; average fewer "
        "checkpoints"
    )
    (workdir / "checkpoints/30/meta/metadata").write_text("")
    assert "step 50 is intact" in error(3)
    shutil.rmtree(workdir / "checkpoints/30")
    assert error(3).endswith(
        f"{workdir}: steps 20 and 50 were trained on different pretrained weights; average fewer "
        "checkpoints"
    )
