"""A small FastSLM as a working directory, and the command run in this process."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from fastslm_jax import cli
from fastslm_jax import config as config_lib
from fastslm_jax.convert import __main__ as command
from fastslm_jax.data import prompts
from fastslm_jax.errors import UserError
from fastslm_jax.models.layers import sinusoids
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import engine, layouts, pretrained

# Windows of 1 s with 3 speech tokens. The encoder has heads of 64, as every published one.
WHISPER = {
    "model_type": "whisper",
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 1,
    "encoder_ffn_dim": 96,
    "num_mel_bins": 16,
    "max_source_positions": 50,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def convert(capsys):
    """convert("import", "--from=…", …): the command, without starting Python anew."""

    def run(*arguments) -> Done:
        values, code = flags.FlagValues(), 0
        command.define_flags(values)
        try:
            command.main(values(["convert", *map(str, arguments)]), values)
        except UserError as error:
            with pytest.raises(SystemExit) as exit_info:
                cli.fail(error)
            code = exit_info.value.code
        return Done(code, *capsys.readouterr())

    return run


def random_leaves(model, seed: int) -> dict[str, np.ndarray]:
    """Every parameter random, but for the position tables."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/").items():
        noise = rng.normal(size=leaf.shape)
        if path.endswith("positions"):
            leaves[path] = sinusoids(*leaf.shape)
        else:
            leaves[path] = (1 + 0.2 * noise if path.endswith("scale") else 0.15 * noise).astype(
                np.float32
            )
    return leaves


@pytest.fixture(scope="session")
def make_workdir(tokenizer_folder):
    """make_workdir(folder) → a working directory as training leaves it, its bases beside it."""
    return functools.partial(write_workdir, tokenizer_folder)


def write_workdir(tokenizer_folder, folder, llm_config: dict | None = None, **model_options):
    """Whisper in bfloat16, Qwen3 in float32."""
    config = config_lib.full_size()
    config.name = "small"
    config.base.whisper, config.base.llm = str(folder / "whisper"), str(folder / "llm")
    config.model.update(
        {
            "stage_tokens": (4, 4, 5),
            "compression_size": 3,
            "dtype": "float32",
            "base_dtype": "float32",
            "remat": "none",
        }
    )
    config.model.lora.update({"rank": 4, "alpha": 8.0})
    config.model.update(model_options)
    if not config.model.lora.rank:
        config.trainable = tuple(rule for rule in config.trainable if "lora" not in rule[0])
    for name, base in (("whisper", WHISPER), ("llm", QWEN3 | (llm_config or {}))):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(base))
    prompts.load_tokenizer(tokenizer_folder).save_pretrained(folder / "llm")
    model = experiment.build(config, weights=False).model
    leaves = random_leaves(model, seed=0)
    whisper = {
        path.removeprefix("encoder/"): leaf
        for path, leaf in leaves.items()
        if path.startswith("encoder/")
    }
    tensors = {
        key: value.astype(ml_dtypes.bfloat16)
        for key, value in engine.store(engine.unflatten(whisper), layouts.hf_whisper())
    }
    save_file(tensors, folder / "whisper/model.safetensors")
    qwen3 = {
        path.removeprefix("llm/"): leaf
        for path, leaf in leaves.items()
        if path.startswith("llm/") and experiment.is_base(path)
    }
    save_file(
        dict(engine.store(engine.unflatten(qwen3), layouts.hf_qwen3())),
        folder / "llm/model.safetensors",
    )
    checkpoints = Checkpoints(folder / "run")
    meta = {
        "config": json.loads(config.to_json_best_effort()),
        "row": 12,
        "bases": {name: pretrained.fingerprint(folder / name) for name in ("whisper", "llm")},
    }
    ours = {
        path: jnp.asarray(leaf) for path, leaf in leaves.items() if not experiment.is_base(path)
    }
    checkpoints.save(3, ours, {"step": jnp.int32(3)}, meta)
    checkpoints.wait()
    checkpoints.close()
    return folder / "run"


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, make_workdir):
    """Never written to."""
    return make_workdir(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def released(workdir, tmp_path_factory):
    """The authors' layout of `workdir`. Never written to."""
    from fastslm_jax.convert import exporting

    out = tmp_path_factory.mktemp("released") / "folder"
    exporting.export(workdir, out, "released")
    return out
