"""A small FastSLM in each format, and the `convert` command in this process."""

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
from fastslm_jax.convert import exporting
from fastslm_jax.data import prompts
from fastslm_jax.errors import UserError
from fastslm_jax.models.layers import sinusoids
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import engine, layouts, pretrained

# Windows of 1 s with 3 speech tokens. The head dimension of the encoder is 64, as in all sizes.
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
    stdout: str
    stderr: str

    @property
    def json(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def convert(capsys):
    """convert("import", "--from=...", fails=False) runs the command and checks its exit code."""

    def run(*arguments, fails: bool = False) -> Done:
        values, code = flags.FlagValues(), 0
        command.define_flags(values)
        try:
            command.main(values(["convert", *map(str, arguments)]), values)
        except UserError as error:
            with pytest.raises(SystemExit) as exit_info:
                cli.fail(error)
            code = exit_info.value.code
        done = Done(*capsys.readouterr())
        assert code == (2 if fails else 0), done.stderr
        return done

    return run


def random_leaves(model, seed: int) -> dict[str, np.ndarray]:
    """Random parameters with the true position tables."""
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
    """make_workdir(folder, ...) → a trained working directory, next to its pretrained models."""
    return functools.partial(write_workdir, tokenizer_folder)


def write_workdir(tokenizer_folder, folder, llm_config: dict | None = None, **model_options):
    """Whisper is stored in bfloat16, the language model in float32."""
    config = config_lib.full_size()
    config.name = "small"
    config.base.whisper, config.base.llm = str(folder / "whisper"), str(folder / "llm")
    config.model.stage_tokens, config.model.compression_size = (4, 4, 5), 3
    config.model.update({"dtype": "float32", "base_dtype": "float32", "remat": "none"})
    config.model.lora.update({"rank": 4, "alpha": 8.0})
    config.model.update(model_options)
    if not config.model.lora.rank:
        config.trainable = tuple(rule for rule in config.trainable if "lora" not in rule[0])
    for name, fields in (("whisper", WHISPER), ("llm", QWEN3 | (llm_config or {}))):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(fields))
    prompts.load_tokenizer(tokenizer_folder).save_pretrained(folder / "llm")
    leaves = random_leaves(experiment.build(config, weights=False).model, seed=0)
    base = {path: leaf for path, leaf in leaves.items() if experiment.is_base(path)}
    tree = engine.unflatten(base)
    whisper = {
        key: value.astype(ml_dtypes.bfloat16)
        for key, value in engine.store(tree["encoder"], layouts.hf_whisper())
    }
    save_file(whisper, folder / "whisper/model.safetensors")
    rows = (QWEN3 | (llm_config or {}))["vocab_size"]
    llm = {
        key: np.ascontiguousarray(value[:rows]) if value.shape[0] > rows else value
        for key, value in engine.store(tree["llm"], layouts.hf_decoder())
    }
    save_file(llm, folder / "llm/model.safetensors")
    meta = {
        "config": json.loads(config.to_json_best_effort()),
        "row": 12,
        "bases": {name: pretrained.fingerprint(folder / name) for name in ("whisper", "llm")},
    }
    ours = {path: jnp.asarray(leaf) for path, leaf in leaves.items() if path not in base}
    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(3, ours, {"step": jnp.int32(3)}, meta)
    checkpoints.wait()
    checkpoints.close()
    return folder / "run"


# The session-scoped folders below are shared by all tests: do not modify them.


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, make_workdir):
    return make_workdir(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def released(workdir, tmp_path_factory):
    """`workdir` in the authors' layout."""
    out = tmp_path_factory.mktemp("released") / "folder"
    exporting.export(workdir, out, "released")
    return out


@pytest.fixture(scope="session")
def hf_folder(workdir, tmp_path_factory):
    """`workdir` as a PyTorch folder."""
    out = tmp_path_factory.mktemp("hf") / "FastSLM"
    exporting.export(workdir, out, "hf")
    return out


@pytest.fixture(scope="session")
def merged_folder(workdir, tmp_path_factory):
    """`workdir` as a PyTorch folder with merged LoRA."""
    out = tmp_path_factory.mktemp("hf") / "Merged"
    exporting.export(workdir, out, "hf", merge_lora=True)
    return out


@pytest.fixture(scope="session")
def load_hf():
    """load_hf(folder) → the PyTorch model, from the code in the folder."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from transformers import AutoModelForSpeechSeq2Seq

    return functools.partial(AutoModelForSpeechSeq2Seq.from_pretrained, trust_remote_code=True)


@pytest.fixture(scope="session")
def load_processor():
    """load_processor(folder) → the processor, from the code in the folder."""
    pytest.importorskip("torch")
    from transformers import AutoProcessor

    return functools.partial(AutoProcessor.from_pretrained, trust_remote_code=True)
