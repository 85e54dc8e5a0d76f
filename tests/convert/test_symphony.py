"""Import of the authors' Hugging Face folders."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastslm_jax.convert import exporting

CONFIG = {
    "model_type": "symphony",
    "architectures": ["SymphonyForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_symphony.SymphonyConfig"},
    "transformers_version": "4.57.1",
    "encoder_config": {
        "n_mels": 16,
        "n_ctx": 50,
        "n_state": 64,
        "n_head": 1,
        "n_layer": 2,
        "stage_tokens": [4, 4, 5],
        "compression_size": 3,
    },
    "lora_r": 4,
    "lora_a": 8,
    "low_resource": False,
    "llm_modules": ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
}


@pytest.fixture
def symphony(workdir, released, tmp_path):
    """write(change) → a folder as the authors publish it: two shards, tokenizer beside them."""

    def write(change=None, encoder_change=None):
        folder = tmp_path / "symphony"
        folder.mkdir()
        tensors = load_file(released / "model.safetensors")
        del tensors["llm.base_model.model.lm_head.weight"]  # tied, so transformers does not save it
        for name in tensors:
            if name.startswith("llm."):
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        names, weight_map = sorted(tensors), {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = {"weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copytree(released / "tokenizer", folder, dirs_exist_ok=True)
        llm_config = json.loads((workdir.parent / "llm/config.json").read_text())
        config = CONFIG | {"llm_config": llm_config} | (change or {})
        config["encoder_config"] = config["encoder_config"] | (encoder_change or {})
        (folder / "config.json").write_text(json.dumps(config))
        return folder, tensors

    return write


def test_import_is_bit_equal(convert, symphony, tmp_path):
    folder, tensors = symphony()
    convert("import", f"--from={folder}", f"--out={tmp_path / 'in'}")
    config = json.loads((tmp_path / "in/config.json").read_text())["model"]
    assert (config["lora"]["rank"], config["lora"]["alpha"]) == (4, 8.0)
    exporting.export(tmp_path / "in", tmp_path / "out", "released")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() - tensors.keys() == {"llm.base_model.model.lm_head.weight"}
    for name, value in tensors.items():
        assert written[name].dtype == value.dtype, name
        np.testing.assert_array_equal(written[name], value, err_msg=name)


WRONG = {
    "unknown keys": (
        {"speech_rate": 2},
        {"n_experts": 4},
        "config.json: unknown keys encoder_config.n_experts, speech_rate; remove those",
    ),
    "a missing key": ({"lora_r": None}, {}, "config.json: lora_r is null"),
    "another encoder": ({}, {"n_layer": 3}, "the tensors have encoder_layers 2"),
    "another rank": ({"lora_r": 8}, {}, "the tensors have lora_rank 4"),
    "fewer adapted modules": (
        {"llm_modules": ["q_proj", "v_proj"]},
        {},
        "config.json: llm_modules is q_proj, v_proj, expected q_proj, k_proj",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_config(name, convert, symphony, tmp_path):
    change, encoder_change, message = WRONG[name]
    folder, _ = symphony(change, encoder_change)
    done = convert("import", f"--from={folder}", f"--out={tmp_path / 'in'}", fails=True)
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "in").exists()
