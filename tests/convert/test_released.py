"""The authors' state_dict in and out: bit-equal, strict, and usable by what comes after."""

import json
import pathlib
import subprocess
import sys

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

ROOT = pathlib.Path(__file__).parents[2]


def assert_same_file(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert second[key].dtype == value.dtype, key
        assert second[key].tobytes() == value.tobytes(), key
        assert second[key].shape == value.shape, key


def test_names_shapes_and_types(released):
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


def test_import_then_export_is_bit_equal(convert, released, tmp_path):
    done = convert("import", f"--from={released}", f"--out={tmp_path / 'in'}")
    assert done.code == 0, done.stderr
    assert done.json["layout"] == "released"
    assert done.json["tensors"] == len(load_file(released / "model.safetensors"))
    assert done.json["seconds"] >= 0
    assert done.json["peak_rss_gib"] > 0
    done = convert(
        "export", f"--workdir={tmp_path / 'in'}", "--layout=released", f"--out={tmp_path / 'out'}"
    )
    assert done.code == 0, done.stderr
    assert done.json["tensors"] == len(load_file(released / "model.safetensors"))
    assert_same_file(released / "model.safetensors", tmp_path / "out/model.safetensors")
    assert (
        json.loads((released / "config.json").read_text())["lora"]
        == json.loads((tmp_path / "out/config.json").read_text())["lora"]
    )


def test_pytorch_file(convert, workdir, released, tmp_path):
    """A lone .pt, as the authors give it: the language model is named apart, and the same tensors come back."""
    import torch

    assert (
        convert(
            "export",
            f"--workdir={workdir}",
            "--layout=released",
            f"--out={tmp_path / 'out'}",
            "--pt",
        ).code
        == 0
    )
    lone = tmp_path / "Stage3_FastSLM.pt"
    (tmp_path / "out/model.pt").rename(lone)
    state = torch.load(lone, weights_only=True)
    assert state.keys() == load_file(released / "model.safetensors").keys()
    assert state["encoder.whisper.conv1.weight"].dtype == torch.bfloat16
    done = convert(
        "import",
        f"--from={lone}",
        f"--out={tmp_path / 'in'}",
        f"--llm={workdir.parent / 'llm'}",
        "--lora_alpha=8",
    )
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "in/config.json").read_text())["model"]["lora"]["alpha"] == 8.0
    assert (
        convert(
            "export",
            f"--workdir={tmp_path / 'in'}",
            "--layout=released",
            f"--out={tmp_path / 'again'}",
        ).code
        == 0
    )
    assert_same_file(released / "model.safetensors", tmp_path / "again/model.safetensors")


def test_trained_leaves_of_another_type_come_back_in_it(convert, released, tmp_path):
    """A file all in bfloat16: what is trained is float32 in the working directory, and bfloat16 again in the export."""
    source = tmp_path / "half"
    source.mkdir()
    tensors = load_file(released / "model.safetensors")
    save_file(
        {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()},
        source / "model.safetensors",
    )
    (source / "config.json").write_text((released / "config.json").read_text())
    (source / "tokenizer").symlink_to(released / "tokenizer")
    assert convert("import", f"--from={source}", f"--out={tmp_path / 'in'}").code == 0
    assert (
        json.loads((tmp_path / "in/config.json").read_text())["model"]["base_dtype"] == "bfloat16"
    )
    assert (
        convert(
            "export",
            f"--workdir={tmp_path / 'in'}",
            "--layout=released",
            f"--out={tmp_path / 'out'}",
        ).code
        == 0
    )
    assert_same_file(source / "model.safetensors", tmp_path / "out/model.safetensors")


def test_imported_checkpoint_answers_as_the_original(convert, workdir, released, tmp_path):
    """Through the functions that eval.py and transcribe use."""
    assert convert("import", f"--from={released}", f"--out={tmp_path / 'in'}").code == 0
    samples = np.random.default_rng(0).normal(0, 3000, 40_000).astype(np.int16)
    answers = []
    for folder in (workdir, tmp_path / "in"):
        checkpoints = Checkpoints(folder, read_only=True)
        step = checkpoints.steps()[-1]
        config = ConfigDict(checkpoints.meta(step)["config"])
        setup = experiment.build(config)
        params = experiment.restore_params(
            setup, checkpoints, step, sharding.make_mesh(data=1, devices=jax.devices()[:1])
        )
        generator = Generator(
            setup.model, unflatten_dict(params, sep="/"), setup.prompt_tokenizer()
        )
        answers.append(generator.answer([Request(samples)], [24])[0].token_ids)
    assert len(answers[0]) > 0
    assert answers[0] == answers[1]


def test_training_goes_on_from_an_import(convert, released, tmp_path):
    """As train.py resumes: step 0, the parameters, and no optimiser state."""
    assert convert("import", f"--from={released}", f"--out={tmp_path / 'in'}").code == 0
    checkpoints = Checkpoints(tmp_path / "in")
    config = ConfigDict(checkpoints.meta(0)["config"])
    abstract = experiment.abstract_params(
        experiment.build(config).model, config.model.base_dtype, sharding.make_mesh(fsdp=4, data=2)
    )
    saved = {path: abstract[path] for path in experiment.saved_paths(abstract, config.trainable)}
    step, params, train, meta = checkpoints.restore_latest(
        saved, {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    )
    assert (step, train, meta["row"]) == (0, {}, 0)
    expected = load_file(released / "model.safetensors")["encoder.llm_proj.weight"].T
    np.testing.assert_array_equal(params["hfq_former/projection/kernel"], expected)
    checkpoints.save(1, params, {"step": jnp.int32(1)}, meta)
    checkpoints.wait()
    assert checkpoints.restore_latest(saved, {"step": jax.ShapeDtypeStruct((), jnp.int32)})[0] == 1
    checkpoints.close()


def test_untied_embeddings(convert, make_workdir, tmp_path):
    workdir = make_workdir(tmp_path / "untied", llm_config={"tie_word_embeddings": False})
    assert (
        convert(
            "export", f"--workdir={workdir}", "--layout=released", f"--out={tmp_path / 'out'}"
        ).code
        == 0
    )
    tensors = load_file(tmp_path / "out/model.safetensors")
    head, embedding = (
        tensors[f"llm.base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens")
    )
    assert not np.array_equal(head, embedding)
    assert convert("import", f"--from={tmp_path / 'out'}", f"--out={tmp_path / 'in'}").code == 0
    assert (
        convert(
            "export",
            f"--workdir={tmp_path / 'in'}",
            "--layout=released",
            f"--out={tmp_path / 'again'}",
        ).code
        == 0
    )
    assert_same_file(tmp_path / "out/model.safetensors", tmp_path / "again/model.safetensors")


def test_the_real_command(released, tmp_path):
    """Once as users run it, and once with an input that is wrong."""
    command = [sys.executable, "-m", "fastslm_jax.convert", "import", f"--out={tmp_path / 'in'}"]
    done = subprocess.run(
        [*command, f"--from={released}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]).keys() >= {
        "layout",
        "tensors",
        "seconds",
        "peak_rss_gib",
    }
    done = subprocess.run(
        [*command, f"--from={tmp_path / 'none.pt'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'none.pt'}: no such file or folder"
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def broken(released, tmp_path):
    """A copy of `released` to break: (folder, its tensors)."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text((released / "config.json").read_text())
    (folder / "tokenizer").symlink_to(released / "tokenizer")
    return folder, dict(load_file(released / "model.safetensors"))


def truncated(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def with_tensors(change):
    def write(folder, tensors):
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return write


def wrong_type(tensors):
    tensors["encoder.llm_proj.weight"] = tensors["encoder.llm_proj.weight"].astype(np.int32)


def missing_layer(tensors):
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


def missing_last_encoder_layer(tensors):
    for key in [key for key in tensors if ".blocks.1." in key]:
        del tensors[key]


def extra_key(tensors):
    tensors["encoder.llm_proj.scale"] = np.ones(3, np.float32)


def transposed(tensors):
    tensors["encoder.llm_proj.weight"] = np.ascontiguousarray(tensors["encoder.llm_proj.weight"].T)


def untied_head(tensors):
    tensors["llm.base_model.model.lm_head.weight"] = -tensors["llm.base_model.model.lm_head.weight"]


def other_config(field, value):
    def write(folder, tensors):
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (config["llm"] if field in config["llm"] else config)[field] = value
        (folder / "config.json").write_text(json.dumps(config))

    return write


class Code:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def pickle_with_code(folder, tensors):
    import torch

    torch.save(
        {"encoder.llm_proj.weight": torch.zeros(2), "code": Code(folder / "was_run")},
        folder / "model.pt",
    )


def plain_pickle(folder, tensors):
    import pickle

    (folder / "model.pt").write_bytes(pickle.dumps({"code": Code(folder / "was_run")}))


def cut_pytorch_file(folder, tensors):
    import torch

    torch.save({key: torch.zeros(100) for key in tensors}, folder / "model.pt")
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[: len(data) // 2])


def no_state_dict(folder, tensors):
    import torch

    torch.save({"epoch": 3, "model": {}}, folder / "model.pt")


def index_of(name):
    def write(folder, tensors):
        save_file(tensors, folder / "model-00001-of-00002.safetensors")
        weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {
            "encoder.llm_proj.bias": name
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def twice(folder, tensors):
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    save_file(
        {"encoder.llm_proj.bias": tensors["encoder.llm_proj.bias"]},
        folder / "model-00002-of-00002.safetensors",
    )


CORRUPT = {
    "truncated file": (truncated, "model.safetensors: not a complete safetensors file"),
    "wrong type": (
        with_tensors(wrong_type),
        "tensor encoder.llm_proj.weight has type I32, weights are one of F64, F32, F16, BF16",
    ),
    "missing layer": (
        with_tensors(missing_layer),
        "model.layers.1.input_layernorm.weight is missing (25 such)",
    ),
    "missing last layer": (
        with_tensors(missing_last_encoder_layer),
        "its tensors have encoder_layers 1",
    ),
    "extra key": (
        with_tensors(extra_key),
        "tensor encoder.llm_proj.scale has no place in this model (1 such)",
    ),
    "transposed matrix": (
        with_tensors(transposed),
        "tensor encoder.llm_proj.weight has shape (64, 32), the model's is (32, 64)",
    ),
    "head that is not tied": (
        with_tensors(untied_head),
        "lm_head.weight differs from the embeddings",
    ),
    "config.json of another encoder": (other_config("encoder_layers", 3), "config.json has 3"),
    "config.json of another decoder": (
        other_config("num_key_value_heads", 4),
        "k_proj.base_layer.weight has shape (32, 32)",
    ),
    "config.json of other stages": (
        other_config("stage_tokens", [4, 4, 4]),
        "stage_tokens (4, 4, 5)",
    ),
    "pickle with code": (pickle_with_code, "holds code beside tensors"),
    "pickle that torch did not write": (plain_pickle, "holds code beside tensors"),
    "cut PyTorch file": (cut_pytorch_file, "model.pt: "),
    "no state_dict": (no_state_dict, "entry 'epoch' is a int, not a tensor"),
    "index with a missing shard": (
        index_of("model-00002-of-00002.safetensors"),
        "names the shard model-00002-of-00002.safetensors, which is missing",
    ),
    "index that leaves the folder": (
        index_of("../secret.safetensors"),
        "names '../secret.safetensors', which leaves the folder",
    ),
    "index with an absolute path": (
        index_of("/etc/passwd"),
        "names '/etc/passwd', which leaves the folder",
    ),
    "tensor in two files": (twice, "encoder.llm_proj.bias stands in more than one file"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_input_is_one_line_and_exit_code_2(name, convert, broken, tmp_path):
    breaks, message = CORRUPT[name]
    folder, tensors = broken
    breaks(folder, tensors)
    done = convert("import", f"--from={folder}", f"--out={tmp_path / 'in'}")
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken"
    ]  # nothing half-written stays behind
    assert not (folder / "was_run").exists()


WRONG = {
    "no command": ([], "nothing: is not one of import, export, check"),
    "unknown command": (["impart"], "impart: is not one of import, export, check"),
    "missing flag": (["import", "--out=x"], "import needs --from"),
    "flag of another command": (
        ["import", "--from={released}", "--out=x", "--layout=hf"],
        "--layout: is no flag of import",
    ),
    "superfluous path": (
        ["export", "x", "--workdir={workdir}", "--layout=hf", "--out=x"],
        "export takes flags only, got x",
    ),
    "one path to check": (["check", "{workdir}"], "check takes two paths"),
    "unknown layout": (
        ["export", "--workdir={workdir}", "--layout=gguf", "--out={tmp}/x"],
        "--layout=gguf: is not one of",
    ),
    "unknown step": (
        ["export", "--workdir={workdir}", "--layout=hf", "--out={tmp}/x", "--step=7"],
        "no checkpoint of step 7; it has 3",
    ),
    "no working directory": (
        ["export", "--workdir={tmp}", "--layout=hf", "--out={tmp}/x"],
        "no checkpoints; train there first",
    ),
    "merged adapter": (
        ["export", "--workdir={workdir}", "--layout=peft", "--out={tmp}/x", "--merge_lora"],
        "--merge_lora: is for",
    ),
    "existing folder": (
        ["export", "--workdir={workdir}", "--layout=hf", "--out={released}"],
        "exists already",
    ),
    "import of a working directory": (
        ["import", "--from={workdir}", "--out={tmp}/x"],
        "is a working directory already",
    ),
    "file without its language model": (
        ["import", "--from={tmp}/lone/model.safetensors", "--out={tmp}/x"],
        "name it with --llm",
    ),
    "folder without a tokenizer": (
        ["import", "--from={tmp}/untold", "--out={tmp}/x"],
        "holds no tokenizer/",
    ),
    "some other file": (
        ["import", "--from={tmp}/other.safetensors", "--out={tmp}/x", "--llm={llm}"],
        "is it a released FastSLM?",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_commands(name, convert, workdir, released, tmp_path):
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone/model.safetensors").symlink_to(released / "model.safetensors")
    (tmp_path / "untold").mkdir()
    (tmp_path / "untold/model.safetensors").symlink_to(released / "model.safetensors")
    (tmp_path / "untold/config.json").symlink_to(released / "config.json")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    arguments, message = WRONG[name]
    names = {
        "workdir": workdir,
        "released": released,
        "tmp": tmp_path,
        "llm": workdir.parent / "llm",
    }
    done = convert(*(argument.format(**names) for argument in arguments))
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))


def test_a_changed_base_is_refused(convert, make_workdir, tmp_path):
    workdir = make_workdir(tmp_path / "small")
    weights = load_file(tmp_path / "small/llm/model.safetensors")
    save_file(
        weights | {"model.norm.weight": -weights["model.norm.weight"]},
        tmp_path / "small/llm/model.safetensors",
    )
    done = convert("export", f"--workdir={workdir}", "--layout=hf", f"--out={tmp_path / 'x'}")
    assert done.code == 2
    assert "trained on other llm weights" in done.stderr
