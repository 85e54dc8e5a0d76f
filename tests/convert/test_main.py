"""The `convert` command: exit codes and error messages."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).parents[2]


def test_command_in_a_new_process(released, tmp_path):
    """One successful run, and one with a missing file."""
    command = [sys.executable, "-m", "fastslm_jax.convert", "import", f"--out={tmp_path / 'in'}"]
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([*command, f"--from={released}"], **options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= {"layout", "tensors", "seconds", "peak_rss_gib"}
    done = subprocess.run([*command, f"--from={tmp_path / 'none.pt'}"], **options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'none.pt'}: no such file or folder"
    assert "Traceback" not in done.stderr


WRONG = {
    "no command": ([], "command '': expected import, export, average, publish or check"),
    "unknown command": (["impart"], "command 'impart': expected import, export, average, publish"),
    "missing flag": (["import", "--out=x"], "import: --from is required"),
    "flag of another command": (
        ["import", "--from={released}", "--out=x", "--layout=hf"],
        "--layout: not a flag of import",
    ),
    "unexpected path": (
        ["export", "x", "--workdir={workdir}", "--layout=hf", "--out=x"],
        "export: expected flags only, got x",
    ),
    "too few checkpoints": (
        ["average", "--workdir={workdir}", "--out={tmp}/x", "--last=2"],
        "--last=2: {workdir} has 1 checkpoint (step 3); average fewer, or train with "
        "--config.keep_checkpoints=2",
    ),
    "step of an average": (
        ["average", "--workdir={workdir}", "--out={tmp}/x", "--step=best"],
        "--step: not a flag of average, which has --last, --out, --workdir",
    ),
    "no best step": (
        ["export", "--workdir={workdir}", "--layout=hf", "--out={tmp}/x", "--step=best"],
        "{workdir}: no checkpoint has dev scores, so none is the best",
    ),
    "one path to check": (["check", "{workdir}"], "check: expected two paths"),
    "unknown layout": (
        ["export", "--workdir={workdir}", "--layout=gguf", "--out={tmp}/x"],
        "--layout=gguf: expected one of",
    ),
    "unknown step": (
        ["export", "--workdir={workdir}", "--layout=hf", "--out={tmp}/x", "--step=777"],
        "777",
    ),
    "no working directory": (
        ["export", "--workdir={tmp}", "--layout=hf", "--out={tmp}/x"],
        "no checkpoint",
    ),
    "merged adapter": (
        ["export", "--workdir={workdir}", "--layout=peft", "--out={tmp}/x", "--merge_lora"],
        "--merge_lora: requires --layout=hf",
    ),
    "PyTorch file of another layout": (
        ["export", "--workdir={workdir}", "--layout=hf", "--out={tmp}/x", "--pt"],
        "--pt: requires --layout=released",
    ),
    "existing folder": (
        ["export", "--workdir={workdir}", "--layout=hf", "--out={released}"],
        "already exists",
    ),
    "import of a working directory": (
        ["import", "--from={workdir}", "--out={tmp}/x"],
        "is already a working directory",
    ),
    "file without its language model": (
        ["import", "--from={tmp}/single/model.safetensors", "--out={tmp}/x"],
        "specify the model with --llm",
    ),
    "folder without a tokenizer": (
        ["import", "--from={tmp}/no_tokenizer", "--out={tmp}/x"],
        "has no tokenizer/",
    ),
    "another file": (
        ["import", "--from={tmp}/other.safetensors", "--out={tmp}/x", "--llm={llm}"],
        "is this a released FastSLM?",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, convert, workdir, released, tmp_path):
    (tmp_path / "single").mkdir()
    (tmp_path / "single/model.safetensors").symlink_to(released / "model.safetensors")
    (tmp_path / "no_tokenizer").mkdir()
    (tmp_path / "no_tokenizer/model.safetensors").symlink_to(released / "model.safetensors")
    (tmp_path / "no_tokenizer/config.json").symlink_to(released / "config.json")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    arguments, message = WRONG[name]
    names = {
        "workdir": workdir,
        "released": released,
        "tmp": tmp_path,
        "llm": workdir.parent / "llm",
    }
    done = convert(*(argument.format(**names) for argument in arguments), fails=True)
    (line,) = done.stderr.splitlines()
    assert message.format(**names) in line
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))
