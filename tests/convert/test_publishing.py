"""A published working directory: what it stores, and what a model of float32 gets from it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fastslm_jax import config as config_lib
from fastslm_jax.convert import opening, publishing
from fastslm_jax.training.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/me/speech/train.jsonl", "speech/train.jsonl"),
        ("/train.jsonl", "train.jsonl"),
        ("runs/a/b/dev.jsonl", "runs/a/b/dev.jsonl"),
        ("gs://bucket/dev.jsonl", "gs://bucket/dev.jsonl"),
        ("", ""),
    ],
)
def test_folders_of_this_machine_are_left_out(path, expected):
    config = config_lib.small_size()
    config.data.train.asr = config_lib.source(path)
    config.data.dev = config.eval.sets.test = path
    config.init_from, config.init_from_step = "/home/me/stage1", "best"
    publishing.leave_out_folders(config)
    found = (config.data.train.asr.path, config.data.dev, config.eval.sets.test)
    assert found == (expected,) * 3
    assert config.init_from == config.init_from_step == ""


def test_trained_parameters_are_stored_in_bfloat16(make_workdir, convert, tmp_path):
    workdir = make_workdir(tmp_path / "run")
    done = convert(
        "publish",
        f"--workdir={workdir}",
        f"--out={tmp_path}/small",
        "--whisper=openai/whisper-base",
        "--llm=Qwen/Qwen3-4B",
        "--dtype=float16",
    )
    given = opening.open_workdir(workdir)
    assert f"{workdir} → {tmp_path}/small: step {given.step}, trained" in done.stdout

    published = Checkpoints(tmp_path / "small", read_only=True)
    assert published.steps() == [given.step]
    meta = published.meta(given.step)
    assert meta["bases"] == given.meta["bases"]
    assert meta["config"]["base"] == {"whisper": "openai/whisper-base", "llm": "Qwen/Qwen3-4B"}
    assert meta["config"]["model"]["dtype"] == "float16"
    assert json.loads((tmp_path / "small/config.json").read_text()) == meta["config"]
    assert list(meta["checksums"]) == ["params"]  # no optimizer state
    dtypes = {path: sum_.split(":")[0] for path, sum_ in meta["checksums"]["params"].items()}
    frozen = {path for path, dtype in dtypes.items() if dtype == "float32"}
    assert frozen == {path for path in dtypes if "positions" in path}
    assert done.json["tensors"] == len(dtypes) - len(frozen)

    files = [file for file in (tmp_path / "small").rglob("*") if file.is_file()]
    assert not [file for file in files if str(tmp_path).encode() in file.read_bytes()]

    for name, folder in given.meta["config"]["base"].items():
        (tmp_path / "small/bases").mkdir(exist_ok=True)
        (tmp_path / "small/bases" / name).symlink_to(folder)
    loaded = opening.open_workdir(tmp_path / "small").leaves
    for path in dtypes:
        expected = given.leaves[path]
        if path not in frozen:
            expected = np.asarray(expected).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(loaded[path], expected, err_msg=path)
