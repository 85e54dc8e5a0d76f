"""`convert check`: tensors and logits of two models in any format."""

import shutil

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

TOLERANCE = 1e-4  # relative to the largest logit


def test_equal_models_in_all_formats(convert, workdir, released, hf_folder, merged_folder):
    pytest.importorskip("torch")
    for first, second in (
        (workdir, released),
        (released / "model.safetensors", hf_folder),
        (workdir, merged_folder),
    ):
        done = convert("check", first, second)
        result = done.json
        assert (result["missing"], result["extra"], result["misshapen"]) == ([], [], [])
        assert result["max_abs_difference"] <= (0 if second is not merged_folder else 1e-6)
        assert result["max_abs_logit_difference"] <= TOLERANCE * result["max_abs_logit"]
        assert result["logits_by"] == ["jax", "jax" if second is released else "torch"]
        groups = [line.split()[0] for line in done.stdout.splitlines()[1:-2]]
        assert groups == ["encoder", "hfq_former", "llm"] + ["lora"] * (second is not merged_folder)


@pytest.fixture
def changed(released, tmp_path):
    """A copy of `released` to change: (folder, its tensors)."""
    shutil.copytree(released, tmp_path / "changed")
    return tmp_path / "changed", load_file(released / "model.safetensors")


def test_changed_values_are_measured(convert, workdir, changed):
    folder, tensors = changed
    tensors["encoder.llm_proj.bias"] = tensors["encoder.llm_proj.bias"] + np.float32(0.25)
    save_file(tensors, folder / "model.safetensors")
    done = convert("check", workdir, folder, "--notorch")
    assert done.json["max_abs_difference"] == pytest.approx(0.25)
    assert done.json["max_abs_logit_difference"] > 0


def test_mismatched_tensors_are_listed(convert, released, changed):
    folder, tensors = changed
    del tensors["encoder.stage1.conv1.bias"]
    tensors["encoder.llm_proj.scale"] = np.ones(2, np.float32)
    tensors["encoder.stage1.conv2.weight"] = np.zeros((64, 64), np.float32)
    save_file(tensors, folder / "model.safetensors")
    done = convert("check", released, folder, fails=True)
    assert done.json["missing"] == ["encoder.stage1.conv1.bias"]
    assert done.json["extra"] == ["encoder.llm_proj.scale"]
    assert done.json["misshapen"] == ["encoder.stage1.conv2.weight"]
    assert done.json["max_abs_logit_difference"] is None
    assert f"{folder}: missing tensor encoder.stage1.conv1.bias" in done.stderr


def test_logits_of_an_audio_file(convert, workdir, hf_folder, tmp_path):
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 12_000), 16_000)
    done = convert("check", workdir, hf_folder, f"--audio={tmp_path / 'noise.wav'}", "--notorch")
    assert done.json["max_abs_logit_difference"] == 0
    assert done.json["logits_by"] == ["jax", "jax"]


def test_modified_code_is_not_executed(convert, workdir, hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "hf")
    with open(tmp_path / "hf/modeling_fastslm.py", "a") as file:
        file.write(f"\nopen({str(tmp_path / 'executed')!r}, 'w')\n")
    done = convert("check", workdir, tmp_path / "hf")
    assert done.json["logits_by"] == ["jax", "jax"]
    assert not (tmp_path / "executed").exists()
