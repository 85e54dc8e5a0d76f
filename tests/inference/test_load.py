"""The config in a checkpoint: checked, and its pretrained folders found after a move."""

import json
import pathlib

import pytest

from fastslm_jax import config as config_lib
from fastslm_jax.errors import UserError
from fastslm_jax.inference import load


class StoredMeta:
    """Checkpoints whose step 4 has this meta."""

    folder = pathlib.Path("runs/a/checkpoints")

    def __init__(self, **meta):
        self._meta = meta

    def meta(self, step):
        assert step == 4
        return self._meta


@pytest.fixture
def fields():
    return json.loads(config_lib.small_size().to_json_best_effort())


def test_the_config_of_a_checkpoint(fields, tmp_path):
    config = load.saved_config(StoredMeta(config=fields), tmp_path, 4)
    assert config.model.lora.rank == 16
    assert config.base.llm == "assets/demo_llm"
    config = load.saved_config(StoredMeta(config=fields), tmp_path, 4, llm="Qwen/Qwen3-4B")
    assert config.base.llm == "Qwen/Qwen3-4B"
    fields["base"]["whisper"] = "/moved/whisper"
    (tmp_path / "bases/whisper").mkdir(parents=True)
    config = load.saved_config(StoredMeta(config=fields), tmp_path, 4)
    assert config.base.whisper == str(tmp_path / "bases/whisper")


def test_a_config_of_an_older_version(fields, tmp_path):
    """Fields with a default in the schema were added later."""
    del fields["model"]["adapter"], fields["model"]["qformer_layers"]
    config = load.saved_config(StoredMeta(config=fields), tmp_path, 4)
    assert (config.model.adapter, config.model.qformer_layers) == ("hfq", 2)


def test_a_config_of_another_version(fields, tmp_path):
    del fields["model"]["audio_padding"]
    message = "^runs/a/checkpoints/4: config.model.audio_padding is missing"
    with pytest.raises(UserError, match=message):
        load.saved_config(StoredMeta(config=fields), tmp_path, 4)
    fields["model"] |= {"audio_padding": "released", "experts": 8}
    message = "^runs/a/checkpoints/4: config.model.experts is not a field of configs"
    with pytest.raises(UserError, match=message):
        load.saved_config(StoredMeta(config=fields), tmp_path, 4)
    for meta in ({}, {"config": None}, {"config": [1]}):
        with pytest.raises(UserError, match=r"^runs/a/checkpoints/4: config is missing"):
            load.saved_config(StoredMeta(**meta), tmp_path, 4)
