"""Weights & Biases without a network: what is written, one id over resumes, one line if missing."""

import sys

import numpy as np
import pytest

from fastslm_jax.errors import UserError
from fastslm_jax.training import wandb_writer
from fastslm_jax.training.wandb_writer import WandbWriter


def test_metrics_and_a_resume(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for step, loss in ((1, 1.25), (2, 0.75)):  # the second is a resume
        writer = WandbWriter("tiny", tmp_path, {"steps": 10, "optimizer": {"b1": 0.875}})
        writer.write_scalars(step, {"loss": np.float32(loss)})
        writer.write_scalars(step, {"dev/wer": 12.5})
        writer.write_texts(step, {"dev/asr": "reference: lamps"})
        writer.flush()
        writer.close()
        ids.append((tmp_path / "wandb_id").read_text())
    wandb.teardown()  # waits for W&B's process
    assert ids[0] == ids[1]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{ids[0]}.wandb"))
    assert len(files) == 2
    for file, loss in zip(files, (b"1.25", b"0.75"), strict=True):
        content = file.read_bytes()
        for part in (b"tiny", b"0.875", b"loss", loss, b"dev/wer", b"12.5", b"reference: lamps"):
            assert part in content, part


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb_writer.check_wandb("")
    with pytest.raises(UserError) as raised:
        wandb_writer.check_wandb("tiny")
    assert str(raised.value) == (
        "config.wandb=tiny: needs the package wandb; pip install -e .[wandb]"
    )
