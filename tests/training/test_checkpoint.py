"""Checkpoints on disk: what is saved comes back, what does not fit is named, and a torn one is passed over."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from fastslm_jax.training import checksums, optim
from fastslm_jax.training.checkpoint import CheckpointError, Checkpoints

BASES = {"whisper": "aaaa", "llm": "bbbb"}


def state_at(step: int):
    """Parameters and training state, all numbers of which depend on the step."""
    params = {
        "hfq_former/out/kernel": step + jnp.arange(6.0).reshape(2, 3),
        "llm/layers/query/lora_b": jnp.full((2, 2, 4), step, jnp.bfloat16),
    }
    optimizer = optim.make_optimizer("adamw", optax.constant_schedule(0.1))
    opt_state = jax.tree.map(lambda leaf: leaf + step, optimizer.init(params))
    return params, {"step": jnp.int32(step), "skipped": jnp.int32(0), "opt_state": opt_state}


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


ABSTRACT = tuple(abstract(tree) for tree in state_at(0))


def save(checkpoints: Checkpoints, *steps: int, scores: dict[int, float] | None = None) -> None:
    for step in steps:
        metrics = {"wer": scores[step]} if scores else None
        checkpoints.save(
            step, *state_at(step), {"row": 4 * step, "config": {"seed": 1}, "bases": BASES}, metrics
        )
    checkpoints.wait()


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    yield checkpoints
    checkpoints.close()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_what_is_saved_comes_back(checkpoints, tmp_path):
    assert checkpoints.restore_latest(*ABSTRACT) is None
    save(checkpoints, 10, 20)
    assert checkpoints.steps() == [10, 20]
    step, params, train, meta = checkpoints.restore_latest(*ABSTRACT)
    assert step == 20
    assert_same((params, train), state_at(20))
    assert (meta["row"], meta["config"], meta["bases"]) == (80, {"seed": 1}, BASES)
    assert_same(checkpoints.restore(10, *ABSTRACT), state_at(10))

    reader = Checkpoints(tmp_path, read_only=True)
    assert_same(reader.restore_params(20, ABSTRACT[0]), state_at(20)[0])
    reader.close()


def test_saving_a_step_twice_keeps_the_first(checkpoints):
    save(checkpoints, 10)
    checkpoints.save(10, *state_at(99), {"row": 0, "bases": BASES})
    checkpoints.wait()
    assert_same(checkpoints.restore(10, *ABSTRACT), state_at(10))


def test_arrays_come_back_in_the_shardings_asked_for(checkpoints):
    save(checkpoints, 10)
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params, _ = ABSTRACT
    asked = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for path, leaf in params.items()
    }
    restored = checkpoints.restore_params(10, asked)
    assert {leaf.sharding for leaf in restored.values()} == {sharding}
    assert_same(jax.device_get(restored), jax.device_get(state_at(10)[0]))


# ----------------------------------------------------------------------------------------------------------- which are kept


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, 2, 3, 4, 5, scores={1: 50.0, 2: 20.0, 3: 30.0, 4: 40.0, 5: 45.0})
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()


def test_checkpoints_without_scores_are_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, 2, 3, 4)
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


def test_scores_of_other_tasks_are_no_word_error_rate(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, *state_at(step), {"row": 0, "bases": BASES}, {"chrf": 10.0 * step})
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    checkpoints.close()


# ---------------------------------------------------------------------------------------------------------- what goes wrong


def test_parameters_that_do_not_fit_are_named(checkpoints, tmp_path):
    save(checkpoints, 10)
    params, train = ABSTRACT
    other = params | {"hfq_former/out/kernel": jax.ShapeDtypeStruct((2, 5), jnp.float32)}
    message = f"{tmp_path}/checkpoints/10: parameter hfq_former/out/kernel is (2, 3), this config's is (2, 5)"
    for restore in (
        lambda: checkpoints.restore(10, other, train),
        lambda: checkpoints.restore_latest(other, train),
    ):
        with pytest.raises(CheckpointError) as raised:
            restore()
        assert str(raised.value) == message
    with pytest.raises(
        CheckpointError, match="parameter hfq_former/new/kernel is missing; is it a checkpoint"
    ):
        checkpoints.restore_params(
            10, params | {"hfq_former/new/kernel": params["hfq_former/out/kernel"]}
        )
    with pytest.raises(
        CheckpointError,
        match="parameter llm/layers/query/lora_b has no place in this config's model",
    ):
        checkpoints.restore_params(10, {"hfq_former/out/kernel": params["hfq_former/out/kernel"]})


def test_other_bases_are_named(checkpoints):
    save(checkpoints, 10)
    checkpoints.check_bases(10, BASES)
    with pytest.raises(
        CheckpointError,
        match=r"was trained on another llm base \(bbbb; config.base.llm is now cccc\)",
    ):
        checkpoints.check_bases(10, BASES | {"llm": "cccc"})


def test_a_folder_without_checkpoints_cannot_be_read(tmp_path):
    with pytest.raises(
        CheckpointError, match="holds no checkpoints; train there first, or name another --workdir"
    ):
        Checkpoints(tmp_path / "nothing", read_only=True)


def cut_files(folder):
    """Every file keeps its first half, as after a full disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


TEARS = {
    "parameters gone": lambda folder: shutil.rmtree(folder / "params"),
    "parameters cut": lambda folder: cut_files(folder / "params"),
    "optimiser state gone": lambda folder: shutil.rmtree(folder / "train"),
    "optimiser state cut": lambda folder: cut_files(folder / "train"),
    "meta gone": lambda folder: (folder / "meta" / "metadata").unlink(),
    "meta cut": lambda folder: cut_files(folder / "meta"),
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
def test_a_torn_checkpoint_is_passed_over(tmp_path, tear):
    writer = Checkpoints(tmp_path)
    save(writer, 10, 20)
    writer.close()
    tear(tmp_path / "checkpoints" / "20")
    checkpoints = Checkpoints(tmp_path)
    step, params, train, meta = checkpoints.restore_latest(*ABSTRACT)
    assert (step, meta["row"]) == (10, 40)
    assert_same((params, train), state_at(10))

    assert checkpoints.steps() == [
        10
    ]  # the torn one is set aside: its step is run, and saved, again
    assert (tmp_path / "checkpoints" / "20.torn").is_dir()
    save(checkpoints, 15, 20)
    assert checkpoints.steps()[-2:] == [15, 20]
    assert_same(checkpoints.restore(20, *ABSTRACT), state_at(20))
    checkpoints.close()


def test_all_torn_is_an_error(tmp_path):
    writer = Checkpoints(tmp_path)
    save(writer, 10, 20)
    writer.close()
    for step in (10, 20):
        cut_files(tmp_path / "checkpoints" / str(step) / "params")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint can be read .*20: .*remove the folder to start anew"
    ):
        checkpoints.restore_latest(*ABSTRACT)
    checkpoints.close()


def test_an_unfinished_checkpoint_is_none(tmp_path):
    """A kill leaves a folder with a temporary name: it is not listed and does not hinder the next save."""
    writer = Checkpoints(tmp_path)
    save(writer, 10)
    writer.close()
    shutil.copytree(
        tmp_path / "checkpoints" / "10", tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp-123"
    )
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [10]
    save(checkpoints, 20)
    assert checkpoints.restore_latest(*ABSTRACT)[0] == 20
    checkpoints.close()


def test_meta_is_json_that_people_can_read(checkpoints, tmp_path):
    save(checkpoints, 10)
    meta = json.loads((tmp_path / "checkpoints" / "10" / "meta" / "metadata").read_text())
    checksums, crc32 = meta.pop("checksums"), meta.pop("crc32")
    assert meta == {"format": 1, "row": 40, "config": {"seed": 1}, "bases": BASES}
    assert set(checksums["params"]) == set(ABSTRACT[0])
    assert checksums["train"]["step"] == "int32:10"
    assert isinstance(crc32, int)


def test_checkpoints_without_checksums_are_read_too(checkpoints, tmp_path):
    save(checkpoints, 10)
    file = tmp_path / "checkpoints" / "10" / "meta" / "metadata"
    meta = {
        name: value
        for name, value in json.loads(file.read_text()).items()
        if name not in ("checksums", "crc32")
    }
    file.write_text(json.dumps(meta))
    assert_same(checkpoints.restore(10, *ABSTRACT), state_at(10))


# ------------------------------------------------------------------------------------------------- damage that stays readable


def rewrite(checkpoints, tmp_path, change):
    """The files of step 20 as another run would have written them: whole in every respect, but not what was saved."""
    params, train = state_at(20)
    change(params, train)
    other = Checkpoints(tmp_path / "other")
    other.save(20, params, train, {"row": 80, "config": {"seed": 1}, "bases": BASES})
    other.wait()
    other.close()
    for item in ("params", "train"):
        shutil.rmtree(tmp_path / "checkpoints/20" / item)
        shutil.copytree(
            tmp_path / "other/checkpoints/20" / item, tmp_path / "checkpoints/20" / item
        )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("params", "params llm/layers/query/lora_b is not what was saved"),
        ("train", "train step is not what was saved"),
    ],
)
def test_a_changed_number_is_noticed(checkpoints, tmp_path, monkeypatch, item, message):
    said = []
    monkeypatch.setattr(absl_logging, "error", lambda text, *values: said.append(text % values))
    save(checkpoints, 10, 20)

    def change(params, train):
        if item == "params":
            leaf = params["llm/layers/query/lora_b"]
            params["llm/layers/query/lora_b"] = leaf.at[1, 1, 3].multiply(1.01)
        else:
            train["step"] += 1

    rewrite(checkpoints, tmp_path, change)
    step, params, train, meta = checkpoints.restore_latest(*ABSTRACT)
    assert (step, meta["row"]) == (10, 40)
    assert_same((params, train), state_at(10))
    assert said == [
        f"checkpoint {tmp_path}/checkpoints/20 cannot be read, trying the one before: {tmp_path}/checkpoints/20: {message} "
        "(1 such): the file is damaged"
    ]


def test_a_changed_meta_is_noticed(checkpoints, tmp_path):
    save(checkpoints, 10, 20)
    file = tmp_path / "checkpoints" / "20" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"row": 80', '"row": 90'))
    assert checkpoints.restore_latest(*ABSTRACT)[0] == 10


def test_checksums_are_the_same_on_any_mesh():
    leaf = jax.random.normal(jax.random.key(0), (4, 6)).astype(jnp.bfloat16)
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    spread = jax.device_put(
        leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b", "a"))
    )
    assert checksums.checksums({"x": leaf}) == checksums.checksums({"x": spread})
    bits = np.asarray(leaf).view(np.uint16).ravel().astype(np.uint64)
    expected = int((bits * (2 * np.arange(24, dtype=np.uint64) + 1)).sum() % 2**32)
    assert checksums.checksums({"x": leaf}) == {"x": f"bfloat16:{expected}"}
    assert checksums.changed({"x": leaf.T.reshape(4, 6)}, {"x": f"bfloat16:{expected}"}) == ["x"]
    assert checksums.changed({"x": leaf.astype(jnp.float32)}, {"x": f"bfloat16:{expected}"}) == []
