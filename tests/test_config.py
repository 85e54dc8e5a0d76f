"""The fields of a config: their types and ranges, and names that flags add."""

import functools
import importlib
import json
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from fastslm_jax import config as config_lib
from fastslm_jax import config_schema
from fastslm_jax.errors import UserError

CONFIGS = {
    "ablation": ("1", "2"),
    "demo": ("1", "2", "3"),
    "librispeech_finetune": ("large,4b,24", "large,1.7b,80", "base,0.6b,24,FOLDER"),
    "stage1_shortform": (),
    "stage2_longform": ("random", "speaker", "recording", "semantic"),
    "stage3_instruct": (),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_of_the_package_are_allowed(name):
    module = importlib.import_module(f"configs.{name}")
    for config in [module.get_config(arg) for arg in CONFIGS[name]] or [module.get_config()]:
        config_lib.check(config)
        config_lib.check(json.loads(config.to_json_best_effort()))  # as a checkpoint stores it


def test_the_schema_has_the_fields_of_the_config():
    config_lib.check(config_lib.full_size())
    config_lib.check(config_lib.small_size())
    config = config_lib.full_size()
    assert set(config_schema.Config.model_fields) == set(config)
    config.stepz = 5
    with pytest.raises(UserError, match=r"^config.stepz is not a field of configs"):
        config_lib.check(config)


def test_a_config_of_an_older_checkpoint_gets_the_newer_fields():
    saved = config_lib.full_size().to_dict()
    for name in ("spec_augment", "wandb"):
        del saved[name]
    for name in ("adapter", "downsample_factor"):
        del saved["model"][name]
    assert config_lib.from_saved(saved).to_dict() == config_lib.full_size().to_dict()
    saved["model"]["adapter"] = "linear"
    with pytest.raises(UserError, match=r"^a/5: config.model.adapter='linear'"):
        config_lib.from_saved(saved, "a/5: config")


COUNTS = (
    *("global_batch_size", "accumulate", "loss_chunk", "steps", "log_every", "eval_every"),
    *("checkpoint_every", "keep_checkpoints", "max_skipped", "eval.batch_size", "data.prefetch"),
    *("data.dev_utterances", "data.row.windows", "data.row.tokens", "data.row.labels"),
)
NOT_NEGATIVE = (
    *("seed", "data.workers", "model.window_batch", "model.lora.rank", "optimizer.warmup_steps"),
    *("model.detail_recovery_layers", "model.compression_size", "model.adapter_mlp_dim"),
)
FLOATS = (
    *("model.lora.alpha", "model.lora.dropout", "input_token_noise", "optimizer.learning_rate"),
    *("optimizer.weight_decay", "optimizer.b1", "optimizer.b2", "optimizer.clip_norm"),
    *("optimizer.final_fraction", "optimizer.adam_learning_rate_ratio", "data.train.long.weight"),
    "model.window_seconds",
    *("data.train.long.join.min_seconds", "data.train.long.join.max_seconds"),
)
CASES = [
    *[(path, value) for path in COUNTS for value in (0, -1, True, 1.0, "1", None, 10**12)],
    *[(path, value) for path in NOT_NEGATIVE for value in (-1, False, 0.5, [], 10**12)],
    *[(path, value) for path in FLOATS for value in (float("nan"), float("inf"), -1.0, "1", True)],
    *[(f"mesh.{axis}", value) for axis in ("data", "fsdp", "tensor") for value in (0, -2, 1.0)],
    *[(f"model.{name}", value) for name in ("dtype", "base_dtype") for value in ("float7", "", 32)],
    *[("model.stage_tokens", value) for value in ((), (0,), (4, -1), (4.0,), 4, (1,) * 9)],
    *[("profile", value) for value in ("5", "8:5", "0:3", "a:b", "5:", 5)],
    *[("trainable", value) for value in ((), (("(", True),), ((".*", 1),), ("x",), ((".*",),))],
    *[("optimizer.learning_rate_ratios", value) for value in ((("*", 0.1),), ((".*", -1.0),))],
    ("model.detail_recovery_layers", 10**7),
    ("model.lora.dropout", 1.0),
    ("model.query_init", "other"),
    ("model.adapter", "linear"),
    *[("model.qformer_layers", value) for value in (0, 101, 2.0)],
    *[("model.downsample_factor", value) for value in (0, 6, True)],
    ("model.compressor_projections", 1),
    ("model.chat_template", "alpaca"),
    ("model.audio_padding", "none"),
    ("model.scan_layers", 1),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.b1", 1.0),
    ("optimizer.b2", 1.5),
    ("optimizer.name", "sgd"),
    ("optimizer.schedule", "step"),
    ("optimizer.final_fraction", 2.0),
    ("input_token_noise", 1.5),
    ("spec_augment.freq_masks", -1),
    ("spec_augment.time_width", 1.5),
    ("spec_augment", {"freq_masks": 2, "freq_width": 0}),
    ("spec_augment", {"time_masks": 2, "time_width": 0.0}),
    ("seed", 2**32),
    ("base.llm", ""),
    ("base.whisper", None),
    ("data.train.long.path", 5),
    ("data.train.long.join.max_seconds", 0.0),
    ("data.train.long.join.grouping", "topic"),
    ("data.train.long.join.distribution", "normal"),
    ("data.train.long.join.gap_seconds", (0.5,)),
    ("data.dev_tasks", "asr"),
    ("eval.sets.test_long", 7),
]


@pytest.mark.parametrize(("path", "value"), CASES, ids=str)
def test_values_that_are_not_allowed_are_named(path, value):
    config = importlib.import_module("configs.stage2_longform").get_config().to_dict()
    *parents, name = path.split(".")
    functools.reduce(dict.__getitem__, parents, config)[name] = value
    with pytest.raises(UserError) as raised:
        config_lib.check(config)
    message = str(raised.value)
    assert message.startswith((f"config.{path}=", f"config.{path}[")), message
    assert len(message.splitlines()) == 1
    assert len(message) < 300


def test_the_message_has_the_name_the_value_and_what_is_allowed():
    config = config_lib.full_size()
    config.optimizer.learning_rate = float("nan")
    message = r"^config.optimizer.learning_rate=nan: should be a finite number$"
    with pytest.raises(UserError, match=message):
        config_lib.check(config)


def test_ranges_of_joined_recordings():
    config = importlib.import_module("configs.stage2_longform").get_config()
    config.data.train.long.join.min_seconds = 901.0
    with pytest.raises(UserError, match=r"^config.data.train.long.join=.*ranges should go from"):
        config_lib.check(config)


@pytest.mark.parametrize("name", ["../other", "a/b", ".hidden", ""])
def test_names_of_sets_and_sources_are_names_of_folders(name):
    for parent, value in (("eval.sets", "x.jsonl"), ("data.train", {"path": "x.jsonl"})):
        fields = json.loads(config_lib.full_size().to_json_best_effort())
        first, second = parent.split(".")
        fields[first][second][name] = value
        with pytest.raises(UserError, match=f"^config.{parent}"):
            config_lib.check(fields)


def test_a_stored_config_with_other_fields():
    fields = json.loads(config_lib.full_size().to_json_best_effort())
    old = {name: value for name, value in fields.items() if name != "loss_chunk"}
    with pytest.raises(UserError, match=r"^runs/a: config.loss_chunk is missing; "):
        config_lib.check(old, "runs/a: config")
    fields["model"]["experts"] = 8
    with pytest.raises(UserError, match=r"^runs/a: config.model.experts is not a field"):
        config_lib.check(fields, "runs/a: config")


# ---- Flags ----


@pytest.fixture
def parse(monkeypatch):
    """parse("--config.steps=5") → the demo's config with these flags."""

    def run(*arguments):
        values, command = flags.FlagValues(), ["train.py", "--config=configs/demo.py:1", *arguments]
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        monkeypatch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
        config_lib.accept_new_names(command, values)
        values(command)
        return values.config

    return run


def test_flags_add_sources_and_sets(parse):
    config = parse(
        "--config.eval.sets.mine=DIR/test.jsonl",
        "--config.eval.sets.test=DIR/other.jsonl",
        "--config.data.train.mine.path=DIR/train.jsonl",
        "--config.data.train.mine.tasks=('asr', 'ast')",
        "--config.data.train.mine.weight=2",
        "--config.data.train.asr.weight=0",
    )
    config_lib.check(config)
    assert config.eval.sets.mine == "DIR/test.jsonl"
    assert config.eval.sets.test == "DIR/other.jsonl"
    assert config.data.train.mine.to_dict() == {
        "path": "DIR/train.jsonl",
        "tasks": ("asr", "ast"),
        "weight": 2.0,
    }
    assert config.data.train.asr.weight == 0
    assert len(config.data.train.joined.join) == 3  # of the config, unchanged


def test_a_new_source_needs_a_path(parse):
    with pytest.raises(UserError, match=r"config.data.train.mine.path='': should have at least 1"):
        config_lib.check(parse("--config.data.train.mine.weight=2"))


def test_flags_do_not_add_other_fields(parse):
    with pytest.raises((AttributeError, KeyError), match="stepz"):
        parse("--config.stepz=5")
