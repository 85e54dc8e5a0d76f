"""The step that is built from a config: what it donates, and what a run is told that its devices cannot hold."""

import importlib

import jax
import pytest
import tiny_experiment

from fastslm_jax import audio, memory, sharding
from fastslm_jax.errors import UserError
from fastslm_jax.plan import published_configs
from fastslm_jax.training import build as training
from fastslm_jax.training import experiment


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "experiment"
    tiny_experiment.write(folder)
    return tiny_experiment.get_config(str(folder))


def build(config, devices: int):
    config.global_batch_size = devices
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:devices])
    setup = experiment.build(config, weights=False, mesh=mesh)
    return setup, training.build(config, setup, mesh), mesh


def test_the_state_is_donated(config):
    """The new state takes the place of the old one: no step holds two."""
    _, built, _ = build(config, 1)
    compiled = built.train_step.lower(built.state, built.frozen, built.batch).compile()
    state = memory.bytes_per_device((built.state.trained, built.state.opt_state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state > 0


def test_a_mesh_that_would_hold_it_is_named(config):
    setup, built, mesh = build(config, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    needed = sum(training.memory_parts(config, setup, built, mesh).values())
    with pytest.raises(UserError) as raised:
        training.check_capacity(config, setup, built, mesh, needed - 1)
    assert "config.mesh {'data': 1, 'fsdp': 2, 'tensor': 1} would need 0.00 GiB" in str(
        raised.value
    )
    with pytest.raises(UserError) as raised:
        training.check_capacity(config, setup, built, mesh, needed // 100)
    assert str(raised.value).endswith(
        "no mesh of these devices fits: use more devices, or fewer rows or labels"
    )


@pytest.mark.parametrize("stage", ["stage1_shortform", "stage2_longform", "stage3_instruct"])
def test_the_full_size_stages_build_by_shape(stage, tmp_path):
    """Every field fits the others: rows, mesh (of eight devices here), patterns of trainables, parameters."""
    config = importlib.import_module(f"configs.{stage}").get_config()
    for base in ("whisper", "llm"):
        config.base[base] = published_configs.local(config.base[base], tmp_path)
    config.mesh.fsdp = 8
    mesh = sharding.make_mesh(**config.mesh)
    built = training.build(config, experiment.build(config, weights=False, mesh=mesh), mesh)
    trained = {path.split("/")[0]: 0 for path in built.trained}
    for path, leaf in built.trained.items():
        trained[path.split("/")[0]] += leaf.size
    lora = 36 * 16 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    assert trained["llm"] == lora == 33_030_144
    assert 55e6 < trained["hfq_former"] < 57e6
    assert set(trained) == {"hfq_former", "llm"}
    assert built.batch["audio"].shape == (64, config.data.row.windows, 480_000 + 2 * audio.CONTEXT)
