"""Opening a working directory or PyTorch folder that was changed after it was written."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

CHANGES = {
    "more speech tokens": (
        "config.json",
        {"compression_size": 4},
        "semantic_distillation.query has shape (3, 64), expected (4, 64)",
    ),
    "no stages": (
        "config.json",
        {"stage_tokens": None},
        "hf/config.json: stage_tokens is null",
    ),
    "stages of text": (
        "config.json",
        {"stage_tokens": ["4"]},
        'hf/config.json: stage_tokens[0] is "4"',
    ),
    "endless layers": (
        "config.json",
        {"detail_recovery_layers": 10**7},
        "detail_recovery_layers is 10000000",
    ),
    "unknown dtype": (
        "config.json",
        {"dtype": "float7"},
        'dtype is "float7"',
    ),
    "no encoder": (
        "config.json",
        {"audio_config": "whisper"},
        'audio_config is "whisper"',
    ),
    "encoder of text": (
        "config.json",
        {"audio_config": {"d_model": "64"}},
        'd_model is "64"',
    ),
    "no decoder": (
        "config.json",
        {"text_config": {}},
        "'model_type' is missing",
    ),
    "adapter that is no flag": (
        "config.json",
        {"has_adapter": 1},
        "has_adapter is 1",
    ),
    "another rank": (
        "adapter_config.json",
        {"r": 2},
        "lora_A.weight has shape (4, 64), expected (2, 64)",
    ),
    "alpha that is no number": (
        "adapter_config.json",
        {"lora_alpha": float("nan")},
        "adapter_config.json: lora_alpha is NaN",
    ),
    "unknown padding": (
        "preprocessor_config.json",
        {"audio_padding": "left"},
        'audio_padding is "left"',
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_config_of_a_pytorch_folder(name, convert, hf_folder, tmp_path):
    file, change, message = CHANGES[name]
    shutil.copytree(hf_folder, tmp_path / "hf")
    config = json.loads((hf_folder / file).read_text())
    (tmp_path / "hf" / file).write_text(json.dumps(config | change))
    done = convert("import", f"--from={tmp_path / 'hf'}", f"--out={tmp_path / 'in'}", fails=True)
    assert message in done.stderr


def test_a_pytorch_folder_without_its_adapter(convert, hf_folder, tmp_path):
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        folder = tmp_path / file
        shutil.copytree(hf_folder, folder)
        (folder / file).unlink()
        done = convert("import", f"--from={folder}", f"--out={tmp_path / 'in'}", fails=True)
        (line,) = done.stderr.splitlines()
        assert f"{file}: " in line
        assert "No such file" in line


def test_changed_pretrained_weights(convert, make_workdir, tmp_path):
    workdir = make_workdir(tmp_path / "small")
    file = tmp_path / "small/llm/model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": -weights["model.norm.weight"]}, file)
    arguments = ("export", f"--workdir={workdir}", "--layout=hf", f"--out={tmp_path / 'out'}")
    done = convert(*arguments, fails=True)
    assert "config.base.llm" in done.stderr
