"""What the variants of the experiments change in the demo's configs."""

import functools

import jax
import pytest

from configs import ablation
from fastslm_jax import config as config_lib
from fastslm_jax.ablate import runs
from fastslm_jax.ablate.suites import SUITES, Stage, Variant
from fastslm_jax.errors import UserError
from fastslm_jax.training import experiment, optim


@functools.cache
def stages() -> tuple[Stage, Stage]:
    following = None
    for name in ("stage2", "stage1"):
        config = ablation.get_config(name[-1])
        model = experiment.build(config, weights=False).model
        following = Stage(
            name, (f"--config=configs/ablation.py:{name[-1]}",), config, model, following
        )
    return following, following.following


def planned(name: str, seeds: int = 1) -> dict[str, runs.Training]:
    """{variant: its last training} of the first seed."""
    return {run.variant: run.training for run in runs.plan(name, SUITES[name], *stages(), seeds)}


def test_the_variants_of_an_experiment_differ_and_are_configs():
    for name, suite in SUITES.items():
        trainings = planned(name)
        assert list(trainings) == list(suite.variants)
        assert len({training.name for training in trainings.values()}) == len(trainings)
        for training in trainings.values():
            config = ablation.get_config(training.stage.name[-1]).unlock()
            config.update_from_flattened_dict(training.changes)
            config_lib.check(config)


@pytest.mark.parametrize(("name", "variant"), [("recovery", "0"), ("adapters", "pooling")])
def test_learning_rate_ratios_fit_the_variant(name, variant):
    """A ratio of parameters that a model lacks would be an error."""
    config = ablation.get_config("1").unlock()
    config.update_from_flattened_dict(planned(name)[variant].changes)
    config.model.scan_layers = True  # faster to trace
    setup = experiment.build(config, weights=False)
    params = experiment.abstract_params(setup.model, "float32")
    mask = optim.trainable_mask(sorted(params), setup.trainable)
    jax.eval_shape(setup.optimizer.init, {p: leaf for p, leaf in params.items() if mask[p]})


def test_the_configured_model_is_shared():
    names = [
        planned(name)[v].name
        for name, v in (
            ("tokens", "50"),
            ("recovery", "2"),
            ("scales", "3"),
            ("stages", "stage 1"),
            ("adapters", "hfq"),
            ("hfq", "as configured"),
        )
    ]
    assert set(names) == {"seed0-stage1"}
    assert planned("stages")["stages 1 and 2"].name == planned("grouping")["random"].name


def test_tokens_per_30_seconds_in_windows_of_6():
    changes = {name: training.changes for name, training in planned("tokens").items()}
    assert changes["100"] == {"model.compression_size": 20, "data.row.tokens": 256 + 4 * 10}
    assert changes["25"] == {"model.compression_size": 5, "data.row.tokens": 256 - 4 * 5}


def test_scales_share_the_queries():
    sizes = [t.changes.get("model.stage_tokens") for t in planned("scales").values()]
    assert sizes == [(48,), (24, 24), None, (12, 12, 12, 12)]


def test_the_longer_stage_1_has_as_much_audio_as_both_stages():
    stage1, stage2 = stages()
    longer = planned("stages")["longer stage 1"].changes["steps"]
    audio = stage1.config.steps * 48 + stage2.config.steps * 192
    assert longer * 48 == audio


def test_a_training_of_stage_2_starts_from_its_stage_1(tmp_path):
    training = planned("grouping")["speaker, no detail recovery"]
    assert training.name == "seed0-stage1-detail_recovery_layers_0-stage2-grouping_speaker"
    flags = training.flags(tmp_path)
    assert f"--config.init_from={tmp_path}/seed0-stage1-detail_recovery_layers_0" in flags
    assert "--config.data.train.long.join.grouping=speaker" in flags
    assert "--config.model.detail_recovery_layers=0" in flags


def test_a_config_that_lacks_what_a_variant_changes():
    stage1, _ = stages()
    with pytest.raises(UserError, match=r"has no field config.model.nothing"):
        stage1.resolve({"model.nothing": 1})
    short = ablation.get_config("1").unlock()
    del short.data.train.joined
    stage = Stage("stage1", ("--config=x",), short, stage1.model)
    with pytest.raises(UserError, match=r"no source of config.data.train joins clips"):
        stage.resolve({"data.train.*.join.grouping": "random"})
    for sets, message in (({}, "add a test set"), ({"test": "a"}, "add long recordings")):
        config = ablation.get_config("1").unlock()
        config.eval.sets = sets
        stage = Stage("stage1", ("--config=x",), config, stage1.model)
        suite = SUITES["stages"]
        with pytest.raises(UserError, match=message):
            runs.plan("stages", suite, stage, stages()[1], 1)


def test_flops_and_parameters_of_the_demo():
    stage1, _ = stages()
    found = runs.costs(stage1.config)
    assert found["parameters"] == {"adapter": 562_624, "trained": 808_384, "all": 4_014_592}
    assert found["flops_per_audio_second"] == pytest.approx(323e6, rel=0.01)
    assert Variant() == Variant({}, {}, None)
