"""Imports as a working directory: bit-exact round trips, and use for inference and training."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from fastslm_jax import sharding
from fastslm_jax.inference.generator import Generator, Request
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints


def assert_same_file(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert second[key].dtype == value.dtype, key
        assert second[key].tobytes() == value.tobytes(), key
        assert second[key].shape == value.shape, key


def test_import_then_export_is_bit_equal(convert, released, tmp_path):
    num_tensors = len(load_file(released / "model.safetensors"))
    done = convert("import", f"--from={released}", f"--out={tmp_path / 'in'}")
    assert done.json["layout"] == "released"
    assert done.json["tensors"] == num_tensors
    assert done.json["seconds"] >= 0
    assert done.json["peak_rss_gib"] > 0
    done = convert(
        "export", f"--workdir={tmp_path / 'in'}", "--layout=released", f"--out={tmp_path / 'out'}"
    )
    assert done.json["tensors"] == num_tensors
    assert_same_file(released / "model.safetensors", tmp_path / "out/model.safetensors")
    before = json.loads((released / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert before["lora"] == after["lora"]


def test_single_pytorch_file(convert, workdir, released, tmp_path):
    """A .pt file without config.json, as the authors publish it; --llm names the language model."""
    torch = pytest.importorskip("torch")
    out, single = tmp_path / "out", tmp_path / "Stage3_FastSLM.pt"
    convert("export", f"--workdir={workdir}", "--layout=released", f"--out={out}", "--pt")
    (out / "model.pt").rename(single)
    state = torch.load(single, weights_only=True)
    assert state.keys() == load_file(released / "model.safetensors").keys()
    assert state["encoder.whisper.conv1.weight"].dtype == torch.bfloat16
    imported = tmp_path / "in"
    llm = workdir.parent / "llm"
    convert("import", f"--from={single}", f"--out={imported}", f"--llm={llm}", "--lora_alpha=8")
    assert json.loads((imported / "config.json").read_text())["model"]["lora"]["alpha"] == 8.0
    convert("export", f"--workdir={imported}", "--layout=released", f"--out={tmp_path / 'again'}")
    assert_same_file(released / "model.safetensors", tmp_path / "again/model.safetensors")


def test_bfloat16_file(convert, released, tmp_path):
    """Trainable parameters are float32 in the working directory and bfloat16 in the export."""
    source, imported = tmp_path / "half", tmp_path / "in"
    source.mkdir()
    tensors = load_file(released / "model.safetensors")
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    save_file(half, source / "model.safetensors")
    (source / "config.json").write_text((released / "config.json").read_text())
    (source / "tokenizer").symlink_to(released / "tokenizer")
    convert("import", f"--from={source}", f"--out={imported}")
    config = json.loads((imported / "config.json").read_text())
    assert config["model"]["base_dtype"] == "bfloat16"
    convert("export", f"--workdir={imported}", "--layout=released", f"--out={tmp_path / 'out'}")
    assert_same_file(source / "model.safetensors", tmp_path / "out/model.safetensors")


def test_untied_embeddings(convert, make_workdir, tmp_path):
    workdir = make_workdir(tmp_path / "untied", llm_config={"tie_word_embeddings": False})
    exported, imported = tmp_path / "out", tmp_path / "in"
    convert("export", f"--workdir={workdir}", "--layout=released", f"--out={exported}")
    tensors = load_file(exported / "model.safetensors")
    head = tensors["llm.base_model.model.lm_head.weight"]
    embedding = tensors["llm.base_model.model.model.embed_tokens.weight"]
    assert not np.array_equal(head, embedding)
    convert("import", f"--from={exported}", f"--out={imported}")
    convert("export", f"--workdir={imported}", "--layout=released", f"--out={tmp_path / 'again'}")
    assert_same_file(exported / "model.safetensors", tmp_path / "again/model.safetensors")


@pytest.mark.parametrize("name", ["hf_folder", "merged_folder"])
def test_pytorch_folder(name, convert, request, tmp_path):
    folder, imported = request.getfixturevalue(name), tmp_path / "in"
    done = convert("import", f"--from={folder}", f"--out={imported}")
    assert done.json["layout"] == "hf"
    convert("export", f"--workdir={imported}", "--layout=hf", f"--out={tmp_path / 'out'}")
    assert_same_file(folder / "model.safetensors", tmp_path / "out/model.safetensors")
    for file in ("adapter_config.json", "chat_template.jinja", "preprocessor_config.json"):
        if (folder / file).exists():
            assert (folder / file).read_text() == (tmp_path / "out" / file).read_text()
    if name == "hf_folder":
        adapter = "adapter_model.safetensors"
        assert_same_file(folder / adapter, tmp_path / "out" / adapter)


def test_an_imported_checkpoint_generates_the_same_tokens(convert, workdir, released, tmp_path):
    convert("import", f"--from={released}", f"--out={tmp_path / 'in'}")
    samples = np.random.default_rng(0).normal(0, 3000, 40_000).astype(np.int16)
    answers = []
    for folder in (workdir, tmp_path / "in"):
        checkpoints = Checkpoints(folder, read_only=True)
        step = checkpoints.steps()[-1]
        config = ConfigDict(checkpoints.meta(step)["config"])
        setup = experiment.build(config)
        mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
        params = experiment.restore_params(setup, checkpoints, step, mesh)
        tree = unflatten_dict(params, sep="/")
        generator = Generator(setup.model, tree, setup.prompt_tokenizer())
        answers.append(generator.answer([Request(samples, max_new_tokens=24)])[0].token_ids)
    assert len(answers[0]) > 0
    assert answers[0] == answers[1]


def test_training_resumes_from_an_import(convert, released, tmp_path):
    """Like train.py: from step 0 with the imported parameters and no optimizer state."""
    convert("import", f"--from={released}", f"--out={tmp_path / 'in'}")
    checkpoints = Checkpoints(tmp_path / "in")
    config = ConfigDict(checkpoints.meta(0)["config"])
    model, mesh = experiment.build(config).model, sharding.make_mesh(fsdp=4, data=2)
    abstract = experiment.abstract_params(model, config.model.base_dtype, mesh)
    saved = {path: abstract[path] for path in experiment.saved_paths(abstract, config.trainable)}
    state = {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    step, params, train, meta = checkpoints.restore_latest(saved, state)
    assert (step, train, meta["row"]) == (0, {}, 0)
    expected = load_file(released / "model.safetensors")["encoder.llm_proj.weight"].T
    np.testing.assert_array_equal(params["hfq_former/projection/kernel"], expected)
    checkpoints.save(1, params, {"step": jnp.int32(1)}, meta)
    checkpoints.wait()
    assert checkpoints.restore_latest(saved, state)[0] == 1
    checkpoints.close()
