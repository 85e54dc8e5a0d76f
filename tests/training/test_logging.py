"""metrics.jsonl over kills and resumes, rates of a step, and what a resumed run says about its config."""

import json
import time

import numpy as np
import pytest
from absl import logging as absl_logging
from ml_collections import ConfigDict

from fastslm_jax.errors import UserError
from fastslm_jax.training import logging as logs


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_step(tmp_path):
    writer = logs.JsonLinesWriter(tmp_path / "metrics.jsonl")
    writer.write_scalars(1, {"loss": np.float32(1.5), "labels": 20})
    writer.write_texts(1, {"dev/asr": "안녕"})
    assert lines_of(tmp_path / "metrics.jsonl") == [  # before close: each line is flushed
        {"step": 1, "loss": 1.5, "labels": 20.0},
        {"step": 1, "texts": {"dev/asr": "안녕"}},
    ]
    writer.close()


def test_steps_to_be_run_again_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = logs.JsonLinesWriter(path)
    for step in (1, 2, 3, 4):
        writer.write_scalars(step, {"loss": step})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # the kill cut this one
    resumed = logs.JsonLinesWriter(path, resume_step=2)
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
    logs.JsonLinesWriter(path).close()
    assert path.read_text() == ""


def test_only_scalars_and_texts(tmp_path):
    writer = logs.JsonLinesWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError, match="takes scalars and texts only"):
        writer.write_images(1, {})
    writer.close()


def test_a_working_directory_has_one_process(tmp_path):
    held = logs.lock(tmp_path / "run")
    with pytest.raises(UserError, match=f"{tmp_path}/run: another process is training there"):
        logs.lock(tmp_path / "run")
    held.close()
    logs.lock(tmp_path / "run").close()


def test_rates(monkeypatch):
    """A step of 2 s, half a second of it waiting; the evaluation in between is no part of it."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timer = logs.Timer()
    clock[0] += 30.0
    assert timer.rates() == {
        "first_step_seconds": 30.0
    }  # the first step says nothing about the others
    # Two rows of two windows of 1 s, one of them half full and one empty, and of four tokens.
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
    for seconds in (1.0, 1.0, 1.0, 6.0):  # an evaluation between two steps is part of neither
        clock[0] += seconds
        timer.finished()
        with timer.paused():
            clock[0] += 100.0
    rates = timer.rates()
    assert (rates["step_seconds_p50"], rates["step_seconds_max"]) == (1.0, 6.0)
    assert rates["step_seconds_p90"] == pytest.approx(1 + 5 * 0.7)
    assert timer.rates()["tokens_per_second"] == 0  # counts start anew


def test_changes_of_the_config_are_named(monkeypatch):
    said = []
    monkeypatch.setattr(
        absl_logging, "warning", lambda message, *values: said.append(message % values)
    )
    before = {"steps": 10, "log_every": 5, "optimizer": {"learning_rate": 0.1}, "gone": 1}
    now = ConfigDict(
        {
            "steps": 10,
            "log_every": 1,
            "optimizer": {"learning_rate": 0.2},
            "mesh": {"data": 8},
            "seed": 3,
        }
    )
    logs.name_changes(
        {"config": before, "data": {"asr": "aaaa", "ast": "bbbb"}},
        now,
        {"asr": "aaaa", "ast": "cccc", "new": "d"},
    )
    assert said == [
        "config.gone was 1 when the run began, it is now None",
        "config.optimizer.learning_rate was 0.1 when the run began, it is now 0.2",
        "config.seed was None when the run began, it is now 3",
        "config.data.train.ast: its manifest has changed since the run began, rows are others from here on",
    ]


@pytest.mark.parametrize("steps", ["5", "5:4", "0:2", "a:b"])
def test_a_profile_names_two_steps(steps, tmp_path):
    with pytest.raises(
        UserError, match=f"config.profile={steps} is not FIRST:LAST, two step numbers such as 5:8"
    ):
        logs.Profile(steps, tmp_path)
