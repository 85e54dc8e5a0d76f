"""Checkpoints on disk: round trips, which are kept, errors, damage, locks and resume warnings."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from ml_collections import ConfigDict

from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.training import checkpoint, checksums, config_changes, optim
from fastslm_jax.training.best import LOWER_IS_BETTER, best_step
from fastslm_jax.training.checkpoint import CheckpointError, Checkpoints, TornCheckpointError

BASES = {"whisper": "aaaa", "llm": "bbbb"}


def state_at(step: int):
    """Parameters and training state; every number depends on the step."""
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
        found = {"wer": scores[step]} if scores else None
        checkpoints.save(
            step, *state_at(step), {"row": 4 * step, "config": {"seed": 1}, "bases": BASES}, found
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


def test_a_checkpoint_round_trips(checkpoints, tmp_path):
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


def test_arrays_are_restored_in_the_requested_shardings(checkpoints):
    save(checkpoints, 10)
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params, _ = ABSTRACT
    requested = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for path, leaf in params.items()
    }
    restored = checkpoints.restore_params(10, requested)
    assert {leaf.sharding for leaf in restored.values()} == {sharding}
    assert_same(jax.device_get(restored), jax.device_get(state_at(10)[0]))


# ---------------------------------------------------------------------------------- which are kept


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, 2, 3, 4, 5, scores={1: 50.0, 2: 20.0, 3: 30.0, 4: 40.0, 5: 45.0})
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_without_scores_only_the_last_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, 2, 3, 4)
    assert checkpoints.steps() == [3, 4]
    assert checkpoints.best_step() is None
    checkpoints.close()


def test_a_resumed_run_keeps_the_best_of_the_former(tmp_path):
    """A kill during the save of a better checkpoint leaves the best so far."""
    writer = Checkpoints(tmp_path, keep=1)
    save(writer, 1, 2, 3, scores={1: 50.0, 2: 20.0, 3: 30.0})
    writer.close()
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp-123")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 3], 2)
    save(checkpoints, 4, 5)  # not scored
    assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 5], 2)
    save(checkpoints, 6, 7, scores={6: 10.0, 7: 15.0})
    assert (checkpoints.steps(), checkpoints.best_step()) == ([6, 7], 6)
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).best_step() == 6


def test_a_damaged_checkpoint_is_not_the_best(tmp_path):
    writer = Checkpoints(tmp_path, keep=2)
    save(writer, 1, 2, 3, scores={1: 10.0, 2: 20.0, 3: 30.0})
    writer.close()
    (tmp_path / "checkpoints/1/meta/metadata").write_text("")
    assert Checkpoints(tmp_path, read_only=True).best_step() == 2


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({1: {"wer": 5.0}, 2: {"wer": 7.0}, 3: {}}, 1),
        ({1: {"cer": 5.0}, 2: {"cer": 4.0}}, 2),
        ({1: {"chrf": 30.0}, 2: {"chrf": 20.0}}, 1),  # higher is better
        ({1: {"chrf": 30.0, "wer": 9.0}, 2: {"chrf": 20.0, "wer": 8.0}}, 2),  # WER comes first
        ({1: {"wer": 5.0}, 2: {"wer": 5.0}}, 2),  # of equals, the latest
        ({1: {"wer": math.nan}, 2: {"wer": 9.0}, 3: {"wer": math.nan}}, 2),
        ({1: {"em": 50.0}, 2: {"wer": 9.0}, 3: {"wer": 8.0}}, 3),  # another dev set since step 2
        ({1: {"loss": 1.0}, 2: {}}, None),
    ],
)
def test_the_best_step(scores, best):
    assert best_step(scores) == best


def test_every_main_metric_can_choose_the_best():
    assert set(LOWER_IS_BETTER) == {"cer", *(task.metric for task in TASKS.values())}


# ------------------------------------------------------------------------------------------ errors


def test_the_error_names_parameters_that_do_not_fit(checkpoints, tmp_path):
    save(checkpoints, 10)
    params, train = ABSTRACT
    other = params | {"hfq_former/out/kernel": jax.ShapeDtypeStruct((2, 5), jnp.float32)}
    message = (
        f"{tmp_path}/checkpoints/10: parameter hfq_former/out/kernel is (2, 3), "
        "this config's is (2, 5)"
    )
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
        match="parameter llm/layers/query/lora_b is not in this config's model",
    ):
        checkpoints.restore_params(10, {"hfq_former/out/kernel": params["hfq_former/out/kernel"]})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("[Errno 28] No space left on device", "(No space left); the last usable step is 10; free"),
        (
            "3/5 futures but timed out after 9 s",
            "(timed out); the last usable step is 10; check that",
        ),
        (
            "lost",
            "(lost); the last usable step is 10; check this folder's storage, and run the same",
        ),
    ],
)
def test_each_failure_to_write_has_its_advice(checkpoints, monkeypatch, error, said):
    save(checkpoints, 10)

    def fail():
        raise OSError(error)

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.wait()
    assert said in str(raised.value)


def test_other_pretrained_weights_are_an_error(checkpoints):
    save(checkpoints, 10)
    checkpoints.check_bases(10, BASES)
    with pytest.raises(
        CheckpointError,
        match=r"trained on different llm weights \(bbbb; config.base.llm has cccc\)",
    ):
        checkpoints.check_bases(10, BASES | {"llm": "cccc"})


def test_other_pretrained_weights_are_accepted_with_a_warning(checkpoints, monkeypatch):
    save(checkpoints, 10)
    messages = []
    monkeypatch.setattr(absl_logging, "warning", lambda text, *args: messages.append(text % args))
    checkpoints.check_bases(10, BASES | {"llm": "cccc"}, accept=True)
    assert messages == [
        f"{checkpoints.folder}/10: trained on different llm weights (bbbb; config.base.llm has "
        "cccc); answers may be worse than its reported scores"
    ]


def test_reading_needs_a_folder_with_checkpoints(tmp_path):
    with pytest.raises(
        CheckpointError, match="no checkpoints; train there first, or use another --workdir"
    ):
        Checkpoints(tmp_path / "nothing", read_only=True)


def cut_files(folder):
    """Truncates every file to its first half, as a full disk does."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "parameters gone": lambda folder: shutil.rmtree(folder / "params"),
    "parameters cut": lambda folder: cut_files(folder / "params"),
    "optimizer state gone": lambda folder: shutil.rmtree(folder / "train"),
    "optimizer state cut": lambda folder: cut_files(folder / "train"),
    "meta gone": lambda folder: (folder / "meta" / "metadata").unlink(),
    "meta cut": lambda folder: cut_files(folder / "meta"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_set_aside(tmp_path, damage):
    writer = Checkpoints(tmp_path)
    save(writer, 10, 20)
    writer.close()
    damage(tmp_path / "checkpoints" / "20")
    checkpoints = Checkpoints(tmp_path)
    step, params, train, meta = checkpoints.restore_latest(*ABSTRACT)
    assert (step, meta["row"]) == (10, 40)
    assert_same((params, train), state_at(10))

    assert checkpoints.steps() == [10]
    assert (tmp_path / "checkpoints" / "20.torn").is_dir()
    save(checkpoints, 15, 20)
    assert checkpoints.steps()[-2:] == [15, 20]
    assert_same(checkpoints.restore(20, *ABSTRACT), state_at(20))
    checkpoints.close()


def garble(folder):
    """Replaces the content of every file by random bytes."""
    rng = np.random.default_rng(0)
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(rng.bytes(file.stat().st_size))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


READ_DAMAGES = {
    **{name: damage for name, damage in DAMAGES.items() if "optimizer" not in name},
    "parameters garbled": lambda folder: garble(folder / "params"),
    "meta garbled": lambda folder: garble(folder / "meta"),
    "meta is a list": lambda folder: (folder / "meta" / "metadata").write_text("[1]"),
    "row is a text": lambda folder: (folder / "meta" / "metadata").write_text(
        re.sub(r'"row": (\d+)', r'"row": "\1"', (folder / "meta" / "metadata").read_text())
    ),
    "everything gone": empty,
}


def read(reader, step):
    reader.meta(step)
    return reader.restore_params(step, ABSTRACT[0])


@pytest.mark.parametrize("damage", READ_DAMAGES.values(), ids=READ_DAMAGES)
def test_a_reader_of_a_damaged_checkpoint_is_told_an_intact_one(tmp_path, damage):
    """eval, transcribe and export choose a step; they do not set damaged checkpoints aside."""
    writer = Checkpoints(tmp_path)
    save(writer, 10, 20)
    writer.close()
    damage(tmp_path / "checkpoints" / "20")
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.steps() == [10, 20]
    with pytest.raises(TornCheckpointError) as raised:
        read(reader, 20)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/checkpoints/20: ")
    assert message.endswith(
        "; step 10 is intact: choose it (--step=10; in eval.py --checkpoint=10), or move the "
        "damaged folder away"
    )
    assert "\n" not in message
    assert_same(read(reader, 10), state_at(10)[0])

    damage(tmp_path / "checkpoints" / "10")
    with pytest.raises(TornCheckpointError, match="; no other step is intact"):
        read(reader, 20)


@pytest.mark.parametrize("make", ["nothing", "a file", "an empty folder", "checkpoints is a file"])
def test_a_reader_needs_a_folder_with_checkpoints(tmp_path, make):
    workdir = tmp_path / "run"
    if make == "a file":
        workdir.write_text("")
    elif make != "nothing":
        workdir.mkdir()
    if make == "checkpoints is a file":
        (workdir / "checkpoints").write_text("")
    message = f"{workdir}: no checkpoints; train there first, or use another --workdir"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(workdir, read_only=True)


def test_a_file_in_place_of_a_checkpoint_is_ignored(tmp_path):
    writer = Checkpoints(tmp_path)
    save(writer, 10)
    writer.close()
    (tmp_path / "checkpoints" / "20").write_text("no folder")
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.steps() == [10]


def test_another_optimizer_is_named(tmp_path):
    """The checkpoint is sound: it must not be called damaged."""
    params, _ = state_at(0)
    writer = Checkpoints(tmp_path)
    writer.save(
        10, *state_at(10), {"row": 0, "bases": BASES, "config": {"optimizer": {"name": "adamw"}}}
    )
    writer.close()
    muon = optim.make_optimizer("muon", optax.constant_schedule(0.1)).init(params)
    train = ABSTRACT[1] | {"opt_state": abstract(muon)}
    config = ConfigDict({"optimizer": {"name": "muon"}})
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.restore_latest(ABSTRACT[0], train, config)
    assert str(raised.value).startswith(
        f"{tmp_path}/checkpoints: config.optimizer.name was 'adamw' before the resume and is now "
        "'muon'; use the former values, or a new --workdir ("
    )
    assert "remove" not in str(raised.value)
    assert checkpoints.steps() == [10]
    checkpoints.close()


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    writer = Checkpoints(tmp_path)
    save(writer, 10, 20)
    writer.close()
    for step in (10, 20):
        cut_files(tmp_path / "checkpoints" / str(step) / "params")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"all checkpoints are unreadable .*20: .*remove the folder to start over",
    ):
        checkpoints.restore_latest(*ABSTRACT)
    checkpoints.close()


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    """A kill during a save leaves a folder with a temporary name."""
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


def test_meta_is_readable_json(checkpoints, tmp_path):
    save(checkpoints, 10)
    meta = json.loads((tmp_path / "checkpoints" / "10" / "meta" / "metadata").read_text())
    checksums, crc32 = meta.pop("checksums"), meta.pop("crc32")
    assert meta == {"format": 2, "row": 40, "config": {"seed": 1}, "bases": BASES}
    assert set(checksums["params"]) == set(ABSTRACT[0])
    assert checksums["train"]["step"] == "int32:10"
    assert isinstance(crc32, int)


# --------------------------------------------------------------------------------- readable damage


def rewrite(checkpoints, tmp_path, change):
    """Replaces the files of step 20 by intact files with other content."""
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
        ("params", "params llm/layers/query/lora_b does not match its checksum"),
        ("train", "train step does not match its checksum"),
    ],
)
def test_a_changed_number_is_detected(checkpoints, tmp_path, monkeypatch, item, message):
    messages = []
    monkeypatch.setattr(absl_logging, "error", lambda text, *values: messages.append(text % values))
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
    assert messages == [
        f"checkpoint {tmp_path}/checkpoints/20 is unreadable, trying the previous one: "
        f"{tmp_path}/checkpoints/20: {message} (1 such arrays): the file is damaged"
    ]


def test_a_changed_meta_is_detected(checkpoints, tmp_path):
    save(checkpoints, 10, 20)
    file = tmp_path / "checkpoints" / "20" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"row": 80', '"row": 90'))
    assert checkpoints.restore_latest(*ABSTRACT)[0] == 10


def test_checksums_do_not_depend_on_the_mesh():
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


# --------------------------------------------------------------------------------- lock and resume


def test_a_working_directory_is_locked(tmp_path):
    file = checkpoint.lock(tmp_path / "run")
    with pytest.raises(UserError, match=f"{tmp_path}/run: another process is training there"):
        checkpoint.lock(tmp_path / "run")
    file.close()
    checkpoint.lock(tmp_path / "run").close()


def test_changes_since_the_checkpoint_are_warned_about(monkeypatch):
    messages = []
    monkeypatch.setattr(
        absl_logging, "warning", lambda text, *values: messages.append(text % values)
    )
    before = {
        "steps": 10,
        "log_every": 5,
        "profile_memory": 1,
        "eval": {"batch_size": 3},
        "optimizer": {"learning_rate": 0.1},
        "gone": 1,
    }
    now = ConfigDict(
        {
            "steps": 10,
            "log_every": 1,
            "optimizer": {"learning_rate": 0.2},
            "mesh": {"data": 8},
            "profile_memory": 2,
            "newer": "",  # off, as before there was such a field
            "model": {"adapter": "hfq", "downsample_factor": 3},  # the first as before
            "seed": 3,
        }
    )
    config_changes.warn_of_changes(
        {"config": before, "data": {"asr": "aaaa", "ast": "bbbb"}},
        now,
        {"asr": "aaaa", "ast": "cccc", "new": "d"},
    )
    assert messages == [
        "config.gone was 1 before the resume and is now None",
        "config.model.downsample_factor was 2 before the resume and is now 3",
        "config.optimizer.learning_rate was 0.1 before the resume and is now 0.2",
        # Only `profile` itself may change freely, not every field whose name begins so.
        "config.profile_memory was 1 before the resume and is now 2",
        "config.seed was None before the resume and is now 3",
        "config.data.train.ast: the manifest has changed since the checkpoint was saved, so the "
        "rows from here on differ",
    ]
