"""Specs of a train step: donation, the memory check, and the full-size stages by shape."""

import importlib
import json

import jax
import pytest
import tiny_experiment

from fastslm_jax import audio, memory, sharding
from fastslm_jax.errors import UserError
from fastslm_jax.plan import published_configs
from fastslm_jax.training import experiment, optim, specs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "experiment"
    tiny_experiment.write(folder)
    return tiny_experiment.get_config(str(folder))


def build(config, devices: int) -> specs.StepSpecs:
    config.global_batch_size = devices
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:devices])
    return specs.build(experiment.build(config, weights=False, mesh=mesh), mesh)


def test_the_state_is_donated(config):
    """The new state reuses the memory of the old one."""
    built = build(config, 1)
    compiled = built.jit().lower(built.state, built.frozen, built.batch).compile()
    state = memory.bytes_per_device((built.state.trained, built.state.opt_state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state > 0


def test_optimizer_state_is_sharded_like_its_parameter(config):
    config.mesh.update({"data": 1, "fsdp": 2})
    built = build(config, 2)
    config.mesh.update({"data": -1, "fsdp": 1})
    path = "llm/layers/query/lora_a"
    expected = built.params[path].sharding
    leaves = jax.tree.leaves(built.state.opt_state, is_leaf=is_flat)
    moments = [leaf[path] for leaf in leaves if is_flat(leaf)]
    assert expected.spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert [leaf.sharding for leaf in moments] == [expected, expected]
    assert built.state.step.sharding.is_fully_replicated


def is_flat(leaf) -> bool:
    return isinstance(leaf, dict)


def test_the_error_names_a_mesh_that_would_fit(config):
    built = build(config, 2)
    assert dict(built.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    needed = sum(specs.memory_parts(built).values())
    advice = r"config.mesh {'data': 1, 'fsdp': 2, 'tensor': 1} would need 0.00 GiB"
    with pytest.raises(UserError, match=advice):
        specs.check_capacity(built, needed - 1)
    advice = "no mesh of these devices fits: use more devices, or fewer rows or labels$"
    with pytest.raises(UserError, match=advice):
        specs.check_capacity(built, needed // 100)


def test_without_lora_the_default_tables_fit(config):
    """--config.model.lora.rank=0 trains the HFQ-Former alone."""
    config = config.copy_and_resolve_references()
    config.model.lora.rank = 0
    config.optimizer.learning_rate_ratios = (("llm/.*", 0.1),)
    built = build(config, 1)
    assert {path.split("/")[0] for path in built.trained} == {"hfq_former"}
    assert not any("lora" in path for path in built.params)


def test_the_encoder_must_fit_the_hfq_former(config, tmp_path):
    """A valid Whisper of width 96, whose heads of 48 the HFQ-Former cannot use."""
    config = config.copy_and_resolve_references()
    fields = tiny_experiment.WHISPER | {"d_model": 96, "encoder_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config.base.whisper = str(tmp_path)
    with pytest.raises(UserError, match="encoder width 96 is not a multiple of 64"):
        experiment.build(config, weights=False)


def test_the_config_is_checked_before_any_work(config):
    config = config.copy_and_resolve_references()
    config.base.llm, config.max_skipped = "/no/such/folder", 0
    with pytest.raises(UserError, match=r"^config.max_skipped=0: should be greater than"):
        experiment.build(config)


@pytest.mark.parametrize(
    ("stage", "hfq_former_rate", "lora_rate"),
    [
        ("stage1_shortform", 5e-4, 1e-4),
        ("stage2_longform", 1e-4, 5e-5),
        ("stage3_instruct", 5e-5, 5e-5),
    ],
)
def test_the_full_size_stages_build_by_shape(stage, hfq_former_rate, lora_rate, tmp_path):
    """Rows, mesh (of eight devices here), trainable patterns and parameters fit each other."""
    config = importlib.import_module(f"configs.{stage}").get_config()
    for base in ("whisper", "llm"):
        config.base[base] = published_configs.local(config.base[base], tmp_path)
    config.mesh.fsdp = 8
    mesh = sharding.make_mesh(**config.mesh)
    built = specs.build(experiment.build(config, weights=False, mesh=mesh), mesh)
    trained = {path.split("/")[0]: 0 for path in built.trained}
    for path, leaf in built.trained.items():
        trained[path.split("/")[0]] += leaf.size
    lora = 36 * 16 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    assert trained["llm"] == lora == 33_030_144
    assert 55e6 < trained["hfq_former"] < 57e6
    assert set(trained) == {"hfq_former", "llm"}
    assert built.batch["audio"].shape == (64, config.data.row.windows, 480_000 + 2 * audio.CONTEXT)
    assert rates(config, built) == {"hfq_former": hfq_former_rate, "llm": lora_rate}


def rates(config, built: specs.StepSpecs) -> dict[str, float]:
    """{module: learning rate after the warmup}, rounded."""
    ratios = [tuple(row) for row in config.optimizer.learning_rate_ratios]
    found = {}
    for module in ("hfq_former", "llm"):
        leaves = {path: leaf for path, leaf in built.trained.items() if path.startswith(module)}
        ((*_, rate),) = optim.learning_rate_groups(
            leaves, "adamw", config.optimizer.learning_rate, ratios
        )
        found[module] = round(rate, 7)
    return found


@pytest.mark.parametrize(
    ("arg", "layers", "width", "ffn", "heads", "rows_at_a_time"),
    [
        ("large,4b,24", 36, 2560, 9728, 32, 1),
        ("large,1.7b,80", 28, 2048, 6144, 16, 4),
        ("base,0.6b,24", 28, 1024, 3072, 16, 1),
    ],
)
def test_the_librispeech_recipe_builds_by_shape(
    arg, layers, width, ffn, heads, rows_at_a_time, tmp_path
):
    config = importlib.import_module("configs.librispeech_finetune").get_config(arg)
    for base in ("whisper", "llm"):
        config.base[base] = published_configs.local(config.base[base], tmp_path)
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:1])
    built = specs.build(experiment.build(config, weights=False, mesh=mesh), mesh)
    lora = sum(leaf.size for path, leaf in built.trained.items() if path.startswith("llm/"))
    query, kv = heads * 128, 8 * 128
    assert lora == layers * 16 * (2 * (width + query) + 2 * (width + kv) + 3 * (width + ffn))
    assert config.global_batch_size == config.accumulate * rows_at_a_time == 16
    assert rates(config, built) == {"hfq_former": 5e-4, "llm": 1e-4}
