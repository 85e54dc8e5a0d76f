"""metrics.jsonl across kills and resumes, the rates of a step, MFU, and the step log."""

import json
import time
import types

import numpy as np
import pytest
from absl import logging as absl_logging
from clu.metric_writers import MultiWriter
from tqdm import tqdm

from fastslm_jax.errors import UserError
from fastslm_jax.training.logging import JsonLinesWriter, Profile, StepLog, Timer, speed


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------- metrics.jsonl


def test_one_line_per_write(tmp_path):
    """Through clu's MultiWriter, as in train.py. Each line is flushed at once."""
    writer = MultiWriter([JsonLinesWriter(tmp_path / "metrics.jsonl")])
    writer.write_scalars(1, {"loss": np.float32(1.5), "labels": 20})
    writer.write_texts(1, {"dev/asr": "안녕"})
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.5, "labels": 20.0},
        {"step": 1, "texts": {"dev/asr": "안녕"}},
    ]
    writer.flush()
    writer.close()


def test_a_resume_drops_the_lines_of_steps_that_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    for step in (1, 2, 3, 4):
        writer.write_scalars(step, {"loss": step})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # truncated by a kill
    resumed = JsonLinesWriter(path, resume_step=2)
    resumed.write_scalars(3, {"loss": 30})
    resumed.close()
    assert lines_of(path) == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2},
        {"step": 3, "loss": 30},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 7, "loss": 1.0}\n')
    JsonLinesWriter(path).close()
    assert path.read_text() == ""


# ------------------------------------------------------------------------------------------- rates


def test_rates(monkeypatch):
    """A step of 2 s, half a second of it waiting; the evaluation in between is not counted."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timer = Timer()
    clock[0] += 30.0
    assert timer.rates() == {"first_step_seconds": 30.0}
    # Two rows of two windows of 1 s (one half full, one empty) and of four tokens.
    windows, segments = np.array([[100, 50], [100, 0]]), np.array([[1, 1, 2, 0], [1, 0, 0, 0]])
    timer.count({"window_frames": windows, "segment_ids": segments})
    with timer.waiting():
        clock[0] += 0.5
    with timer.paused():
        clock[0] += 60.0
    clock[0] += 1.5
    timer.finished()
    assert timer.rates() == {
        "step_seconds": 2.0,
        "audio_seconds_per_second": 2.5 / 2.0,
        "tokens_per_second": 4 / 2.0,
        "data_wait_fraction": 0.25,
        "window_fill": 3 / 4,
        "token_fill": 4 / 8,
        "step_seconds_p50": 2.0,
        "step_seconds_p90": 2.0,
        "step_seconds_max": 2.0,
    }
    for seconds in (1.0, 1.0, 1.0, 6.0):
        clock[0] += seconds
        timer.finished()
        with timer.paused():
            clock[0] += 100.0
    rates = timer.rates()
    assert (rates["step_seconds_p50"], rates["step_seconds_max"]) == (1.0, 6.0)
    assert rates["step_seconds_p90"] == pytest.approx(1 + 5 * 0.7)
    assert timer.rates()["tokens_per_second"] == 0  # counts are reset


def test_mfu_is_a_fraction_of_the_peak_of_all_chips():
    """Four v5e chips of 197 TFLOP/s each: 394 TFLOP in one second is half of their peak."""
    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    mesh = types.SimpleNamespace(devices=np.array([chip] * 4), size=4)
    assert speed(394e12, 1.0, mesh) == {"flops_per_second": 394e12, "mfu": 0.5}
    assert speed(394e12, 2.0, mesh)["mfu"] == 0.25
    assert speed(394e12, None, mesh) == {}


@pytest.mark.parametrize("steps", ["5", "5:4", "0:2", "a:b"])
def test_a_profile_needs_two_step_numbers(steps, tmp_path):
    with pytest.raises(
        UserError, match=f"config.profile={steps} is not FIRST:LAST, two step numbers such as 5:8"
    ):
        Profile(steps, tmp_path)


# ---------------------------------------------------------------------------------------- step log


@pytest.fixture
def log(tmp_path):
    """A log of steps 1 to 6 that writes every third one."""
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind="?")]), size=1)
    log = StepLog(
        writer=JsonLinesWriter(tmp_path / "metrics.jsonl"),
        bar=tqdm(disable=True),
        timer=Timer(),
        profile=Profile("", tmp_path),
        mesh=mesh,
        schedule=lambda step: 0.1 * step,
        first_step=1,
        last_step=6,
        log_every=3,
        max_skipped=2,
        global_batch_size=4,
        flops_per_step=1e9,
    )
    yield log
    log.close()


def take_steps(log: StepLog, skipped: list[int]) -> None:
    """Steps 1, 2, …, each with its count of consecutive skipped steps."""
    batch = {"window_frames": np.ones((1, 2)), "segment_ids": np.ones((1, 3))}
    for step, count in enumerate(skipped, start=1):
        log.begin(step, batch)
        log.end(step, {"loss": np.float32(step), "skipped": np.int32(count)})


def test_the_first_the_last_and_every_nth_step_are_written(log, tmp_path):
    take_steps(log, [0, 1, 0, 0, 0, 0])
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6]
    assert [line["loss"] for line in lines] == [1, 3, 6]
    assert [line["skipped_total"] for line in lines] == [0, 1, 1]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.0, 0.2, 0.5])
    assert "first_step_seconds" in lines[0]
    assert lines[1]["flops_per_second"] == pytest.approx(1e9 / lines[1]["step_seconds"])


def test_too_many_skipped_steps_end_the_run(log, monkeypatch):
    """Metrics are read one step late: the error comes with the step after."""
    messages = []
    monkeypatch.setattr(
        absl_logging, "warning", lambda text, *values: messages.append(text % values)
    )
    take_steps(log, [0, 0, 0, 1])
    assert messages == []
    with pytest.raises(UserError, match="rows 12 to 19 of the data"):
        take_steps(log, [0, 0, 0, 1, 2, 0])
    assert messages[0] == "step 4: loss or gradients are not finite, step skipped (1 in a row)"
