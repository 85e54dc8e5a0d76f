"""Opening a working directory or PyTorch folder that was changed after it was written."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

CHANGES = {
    "fewer speech tokens": (
        {"compression_size": 4},
        "semantic_distillation.query has shape (3, 64), expected (4, 64)",
    ),
    "no LoRA": ({"lora_rank": 0}, "lora_A.weight and 27 more"),
    "no stages": ({"stage_tokens": None}, "hf/config.json: stage_tokens is null"),
    "stages of text": ({"stage_tokens": ["4"]}, 'hf/config.json: stage_tokens[0] is "4"'),
    "endless layers": ({"detail_recovery_layers": 10**7}, "detail_recovery_layers is 10000000"),
    "alpha that is no number": ({"lora_alpha": float("nan")}, "lora_alpha is NaN"),
    "unknown dtype": ({"dtype": "float7"}, 'dtype is "float7"'),
    "unknown padding": ({"audio_padding": "left"}, 'audio_padding is "left"'),
    "no encoder": ({"audio_config": "whisper"}, 'audio_config is "whisper"'),
    "encoder of text": ({"audio_config": {"d_model": "64"}}, 'd_model is "64"'),
    "no decoder": ({"text_config": {}}, "'model_type' is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_config_of_a_pytorch_folder(name, convert, hf_folder, tmp_path):
    change, message = CHANGES[name]
    shutil.copytree(hf_folder, tmp_path / "hf")
    config = json.loads((hf_folder / "config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | change))
    done = convert("import", f"--from={tmp_path / 'hf'}", f"--out={tmp_path / 'in'}", fails=True)
    assert message in done.stderr


def test_changed_pretrained_weights(convert, make_workdir, tmp_path):
    workdir = make_workdir(tmp_path / "small")
    file = tmp_path / "small/llm/model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": -weights["model.norm.weight"]}, file)
    arguments = ("export", f"--workdir={workdir}", "--layout=hf", f"--out={tmp_path / 'out'}")
    done = convert(*arguments, fails=True)
    assert "config.base.llm" in done.stderr
