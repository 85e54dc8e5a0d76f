"""Exports of a working directory: names, shapes and dtypes, complete folders, and errors."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from fastslm_jax.convert import exporting
from fastslm_jax.weights.tensors import SafetensorsSource, write_sharded


def test_released_names_shapes_and_dtypes(released):
    tensors = load_file(released / "model.safetensors")
    assert tensors["encoder.compressor3.query"].shape == (1, 5, 64)
    assert tensors["encoder.compressor.kv_pos_embeds"].shape == (13, 64)
    assert tensors["encoder.stage2.conv2.weight"].shape == (64, 64, 3)
    assert tensors["encoder.whisper.blocks.1.mlp.2.weight"].shape == (64, 96)
    assert tensors["encoder.whisper.conv1.weight"].dtype == ml_dtypes.bfloat16
    down = "llm.base_model.model.model.layers.1.mlp.down_proj"
    assert tensors[f"{down}.base_layer.weight"].shape == (32, 64)
    assert tensors[f"{down}.lora_A.default.weight"].shape == (4, 64)
    assert tensors[f"{down}.lora_B.default.weight"].shape == (32, 4)
    embedding = tensors["llm.base_model.model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(tensors["llm.base_model.model.lm_head.weight"], embedding)


def test_hf_folder_is_complete(hf_folder):
    """Config, weights, tokenizer, processor, model card, and code that does not import JAX."""
    pytest.importorskip("torch")
    from transformers import AutoFeatureExtractor, AutoTokenizer

    names = {path.name for path in hf_folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        "modeling_fastslm.py",
    }
    assert not any("jax" in file.read_text() for file in hf_folder.glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(hf_folder, trust_remote_code=True)
    assert tokenizer.convert_ids_to_tokens(list(range(300, 309)))[0] == "<|AUDIO|>"
    extractor = AutoFeatureExtractor.from_pretrained(hf_folder, trust_remote_code=True)
    sizes = (extractor.feature_size, extractor.hop_length, extractor.sampling_rate)
    assert sizes == (16, 160, 16_000)
    assert extractor.chunk_length == 1.0
    card = (hf_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "3 tokens per window of 1 s" in card
    assert "LoRA of rank 4" in card


def test_hf_shards_with_an_index(workdir, hf_folder, load_hf, tmp_path, monkeypatch):
    monkeypatch.setattr(
        exporting,
        "write_sharded",
        lambda folder, tensors: write_sharded(folder, tensors, max_bytes=200_000),
    )
    exporting.export(workdir, tmp_path / "hf", "hf")
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    whole = load_file(hf_folder / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert all((tmp_path / "hf" / name).stat().st_size < 220_000 for name in files)
    source = SafetensorsSource(tmp_path / "hf")
    assert all(np.array_equal(source.read(key), value) for key, value in whole.items())
    name = "model.hfq_former.projection.weight"
    weights = load_hf(tmp_path / "hf").get_parameter(name)
    np.testing.assert_array_equal(weights.detach().numpy(), whole[name])


def test_only_hf_exports_without_lora(make_workdir, convert, tmp_path):
    workdir = make_workdir(tmp_path / "small", lora={"rank": 0})
    arguments = ("export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
    for layout in ("peft", "released"):
        done = convert(*arguments, f"--layout={layout}", fails=True)
        assert "has no LoRA" in done.stderr
    convert(*arguments, "--layout=hf")


def test_a_failed_export_leaves_no_files(convert, workdir, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(exporting, "model_card", fail)
    arguments = ("export", f"--workdir={workdir}", "--layout=hf", f"--out={tmp_path / 'out'}")
    done = convert(*arguments, fails=True)
    assert done.stderr == "error: model.safetensors: No space left on device\n"
    assert list(tmp_path.iterdir()) == []
