"""Folders of the demo's pretrained models."""

import json

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import load_file

from fastslm_jax.demo import model_folder


def test_a_finished_model_replaces_an_older_one(tmp_path):
    (tmp_path / "demo_llm").mkdir()
    (tmp_path / "demo_llm" / "old").touch()
    unfinished = model_folder.create_unfinished(tmp_path, "demo_llm")
    (unfinished / model_folder.CHECKPOINTS).mkdir()
    tensors = [("a", np.full((2, 3), 0.5, np.float32))]
    model_folder.write(unfinished, {"model_type": "qwen3"}, tensors, {"seed": 3})
    folder = model_folder.publish(unfinished)
    assert folder == tmp_path / "demo_llm"
    assert [path.name for path in tmp_path.iterdir()] == ["demo_llm"]
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "TRAINING.json"}
    stored = load_file(folder / "model.safetensors")["a"]
    assert (stored.dtype, stored.tolist()) == (ml_dtypes.bfloat16, [[0.5] * 3] * 2)
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "qwen3", "torch_dtype": "bfloat16"}
    assert model_folder.earlier_training(str(folder)) == {"went_on_from": {"seed": 3}}


def test_the_recorded_command_has_all_flags_but_empty_ones(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_integer("seed", 0, "", flag_values=values)
    flags.DEFINE_string("llm_init", "", "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    command = model_folder.command_line("train_llm", ("seed", "llm_init"))
    assert command == "python -m fastslm_jax.demo.train_llm --seed=0"
