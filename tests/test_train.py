"""train.py on a tiny experiment: what it logs, what it survives, and the one line that it says when it cannot go on."""

import json
import os
import resource
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
import tiny_experiment
from absl import logging as absl_logging

import train
from fastslm_jax import memory
from fastslm_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_experiment.write(folder / "experiment")
    tiny_experiment.cache_programs(folder / "cache")
    yield folder / "experiment"
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def run(folder):
    """run(workdir, {field: value}): train.py in this process, two rows a step on one of the eight devices."""
    patch = pytest.MonkeyPatch()
    patch.setattr(jax, "devices", lambda devices=jax.devices()[:1]: devices)
    build, programs = train.training.build, {}

    def build_once(config, setup, mesh):
        """Runs whose step is the same share one, so that it is traced once."""
        fields = (
            "model",
            "optimizer",
            "trainable",
            "steps",
            "seed",
            "global_batch_size",
            "accumulate",
            "loss_chunk",
        )
        key = (str([config[field] for field in fields]), str(config.data.row), mesh)
        if key not in programs:
            programs[key] = build(config, setup, mesh)
        return programs[key]

    patch.setattr(train.training, "build", build_once)
    lock, locks = train.lock, []
    patch.setattr(train, "lock", lambda workdir: locks.append(lock(workdir)) or locks[-1])

    def run(workdir, changes=None):
        config = tiny_experiment.get_config(str(folder))
        with config.unlocked():
            config.update_from_flattened_dict(changes or {})
        given = dict.fromkeys(("coordinator", "num_processes", "process_id"))
        patch.setattr(
            train,
            "FLAGS",
            types.SimpleNamespace(config=config.lock(), workdir=str(workdir), **given),
        )
        handler = signal.getsignal(signal.SIGTERM)
        try:
            train.main(None)
        finally:
            signal.signal(signal.SIGTERM, handler)
            locks.pop().close()  # an error that somebody keeps would keep it held
        return tiny_experiment.losses(workdir)

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """A working directory after six steps, with checkpoints of steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, {"profile": "2:3"})
    return workdir


@pytest.fixture
def at_step_4(undisturbed, tmp_path):
    """A copy of it as it was after step 4."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    return tmp_path / "run"


@pytest.fixture
def said(monkeypatch):
    """Warnings and errors."""
    lines = []
    for level in ("warning", "error"):
        monkeypatch.setattr(absl_logging, level, lambda text, *values: lines.append(text % values))
    return lines


def on_batch(monkeypatch, number: int, act) -> None:
    """Calls act() when train.py asks for its batch of that number (from 1 on)."""
    batches = train.pipeline.batches

    def watched(*args, **options):
        for drawn, batch in enumerate(batches(*args, **options), start=1):
            if drawn == number:
                act()
            yield batch

    monkeypatch.setattr(train.pipeline, "batches", watched)


# ------------------------------------------------------------------------------------------------------------ what it logs


def test_what_is_measured(undisturbed):
    first, *lines = [
        json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()
    ]
    assert first["compile_seconds"] > 0
    assert [line["step"] for line in lines] == [2, 3, 4, 5, 6]
    for line in lines:
        assert line["recompilations"] == line["skipped"] == 0
        assert line["compile_seconds"] == first["compile_seconds"]
        assert 0 < line["step_seconds_p50"] <= line["step_seconds_p90"] <= line["step_seconds_max"]
        assert line["tokens_per_second"] == pytest.approx(
            line["token_fill"] * 2 * 128 / line["step_seconds"], rel=1e-3
        )
        assert line["flops_per_second"] > 0
        assert 0 <= line["data_wait_fraction"] <= 1
        assert "mfu" not in line  # nobody says what a CPU's peak is
    assert list((undisturbed / "profile").rglob("*.xplane.pb"))


# --------------------------------------------------------------------------------------------------------- what it survives


def test_mfu_is_a_part_of_the_peak_of_all_chips():
    """Four v5e chips of 197 TFLOP/s each: 394 TFLOP in a second are half of what they could do."""
    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    mesh = types.SimpleNamespace(devices=np.array([chip] * 4), size=4)
    assert train.speed(394e12, 1.0, mesh) == {"flops_per_second": 394e12, "mfu": 0.5}
    assert train.speed(394e12, 2.0, mesh)["mfu"] == 0.25
    assert train.speed(394e12, None, mesh) == {}


def test_sigterm_saves_and_the_run_goes_on(run, undisturbed, tmp_path, monkeypatch, said):
    on_batch(
        monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM)
    )  # drawn before the third step
    assert sorted(run(tmp_path)) == [1, 2, 3]
    assert "SIGTERM: saved step 3, stopping; run the same command to go on" in said
    assert (tmp_path / "checkpoints/3").is_dir()
    monkeypatch.undo()
    assert run(tmp_path) == tiny_experiment.losses(undisturbed)


def test_a_corrupt_checkpoint_is_passed_over(run, undisturbed, at_step_4, said):
    largest = max(
        (at_step_4 / "checkpoints/4/params").rglob("*"),
        key=lambda file: file.stat().st_size * file.is_file(),
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert run(at_step_4) == tiny_experiment.losses(undisturbed)
    (line,) = (line for line in said if "cannot be read" in line)
    assert line.startswith(
        f"checkpoint {at_step_4}/checkpoints/4 cannot be read, trying the one before: "
    )
    assert (at_step_4 / "checkpoints/4.torn").is_dir()


def test_a_full_disk_ends_the_run_and_loses_nothing(run, undisturbed, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk():
        while not (tmp_path / "checkpoints/2").is_dir():  # saves are asynchronous
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))

    on_batch(monkeypatch, 4, fill_disk)
    try:
        with pytest.raises(UserError) as raised:
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(raised.value) == (
        f"{tmp_path}/checkpoints: a checkpoint could not be written (File too large); step 2 is the last one that can be used. "
        "Make room there and run the same command again"
    )
    monkeypatch.undo()
    assert run(tmp_path) == tiny_experiment.losses(undisturbed)


def test_changes_are_named_on_resume(run, folder, at_step_4, tmp_path, said):
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    manifest = folder / "changed.jsonl"
    manifest.write_text("".join(lines[:-1]))
    run(at_step_4, {"data.train.noise.path": str(manifest), "data.prefetch": 3})
    assert "config.data.prefetch was 2 when the run began, it is now 3" in said
    assert (
        "config.data.train.noise: its manifest has changed since the run began, rows are others from here on"
        in said
    )


def test_another_base_is_refused(run, folder, at_step_4, tmp_path):
    shutil.copytree(folder / "llm", tmp_path / "llm")
    config = tmp_path / "llm/config.json"
    config.write_text(config.read_text().replace("4096", "8192"))
    with pytest.raises(
        UserError,
        match=r"checkpoints/4: was trained on another llm base \(\w+; config.base.llm is now \w+\)",
    ):
        run(at_step_4, {"base.llm": str(tmp_path / "llm")})


def test_steps_that_are_not_finite_end_the_run(run, tmp_path, monkeypatch, said):
    batches = train.pipeline.batches

    def broken(*args, **options):
        for step, batch in enumerate(batches(*args, **options), start=1):
            yield (
                batch
                if step in (1, 3)
                else batch | {"lora_gate": np.full_like(batch["lora_gate"], np.nan)}
            )

    monkeypatch.setattr(train.pipeline, "batches", broken)
    with pytest.raises(UserError) as raised:
        run(tmp_path, {"max_skipped": 3})
    assert str(raised.value) == (
        "3 steps in a row (up to step 6) had no finite loss or gradients: rows 6 to 11 of the data; look at them, or lower "
        "config.optimizer.learning_rate"
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 0, 1, 2]
    assert [line["skipped_total"] for line in lines] == [0, 1, 1, 2, 3]


# ------------------------------------------------------------------------------------------------- what cannot begin at all

ERRORS = {
    "wrong device count": (
        {"mesh.fsdp": 3},
        "config.mesh {'data': -1, 'fsdp': 3, 'tensor': 1} does not fit 1 devices; its sizes must multiply to that number, the "
        "nearest that do are {'data': 1, 'fsdp': 1, 'tensor': 1}",
    ),
    "indivisible batch": (
        {"accumulate": 4},
        "config.global_batch_size=2 does not divide over data × fsdp = 1 devices in 4 micro-batches",
    ),
    "unknown trainable pattern": (
        {"trainable": ((r"decoder/.*", True), (r".*", False))},
        "pattern 'decoder/.*' of config.trainable decides no parameter; remove it or mend it",
    ),
    "row too small": (
        {"data.row.tokens": 16},
        "a row has 4, 16 and 48 (24 of 24 clips fit no row): raise config.data.row",
    ),
    "missing base": (
        {"base.llm": "/nowhere/llm"},
        "/nowhere/llm: no such folder; give a folder with config.json",
    ),
    "unknown attention": (
        {"model.attention": "flash"},
        "config.model.attention=flash is not one of auto, xla, splash",
    ),
    "unknown remat": (
        {"model.remat": "gates"},
        "config.model.remat=gates: unknown name 'gates'; choose none, full, dots, or a",
    ),
    "window groups": (
        {"model.window_batch": 3},
        "config.model.window_batch=3 does not divide the 4 windows of config.data.row",
    ),
    "profile": (
        {"profile": "4"},
        "config.profile=4 is not FIRST:LAST, two step numbers such as 5:8",
    ),
    "missing stage": (
        {"init_from": "/nowhere/stage1"},
        "/nowhere/stage1: holds no checkpoints; train there first",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_config_that_cannot_run(run, tmp_path, name, monkeypatch):
    changes, line = ERRORS[name]
    monkeypatch.setattr(train.pipeline, "batches", lambda *_, **__: pytest.fail("it went on"))
    with pytest.raises(UserError) as raised:
        run(tmp_path, changes)
    assert line in str(raised.value)


def test_too_little_memory_is_said_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda devices=jax.local_devices()[:2]: devices)
    monkeypatch.setattr(memory, "capacity_of", lambda mesh: 1_200_000)
    monkeypatch.setattr(train.experiment, "init_params", lambda *_: pytest.fail("it went on"))
    with pytest.raises(UserError) as raised:
        run(tmp_path)
    assert str(raised.value).startswith(
        "config.mesh {'data': 2, 'fsdp': 1, 'tensor': 1}: a train step needs at least 0.00 GiB"
    )
