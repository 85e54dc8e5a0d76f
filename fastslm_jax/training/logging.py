"""What a run writes down: metrics as JSON lines, rates, traces, and whether it is the run that it says it goes on with."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from clu import metric_writers
from ml_collections import ConfigDict

from fastslm_jax.audio import HOP, SAMPLE_RATE
from fastslm_jax.errors import UserError


def lock(workdir: str | os.PathLike):
    """Takes the working directory for this process, until it ends however it ends. Keep the file that is returned.

    Raises:
        UserError: another process trains there.
    """
    path = pathlib.Path(workdir) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115 (held open while the process lives)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"{workdir}: another process is training there; wait for it, or name another --workdir"
        ) from None
    return file


class JsonLinesWriter(metric_writers.MetricWriter):
    """One JSON object a line: {"step": 10, "loss": 1.5, …}. After a resume, lines of steps to be run again are dropped first."""

    def __init__(self, path: str | os.PathLike, resume_step: int = 0):
        self.path = pathlib.Path(path)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= resume_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.path)
        self._file = open(self.path, "a")  # noqa: SIM115 (closed in close())

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write({"step": step} | {name: float(value) for name, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write({"step": step, "texts": dict(texts)})

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def write_summaries(self, step, values, metadata=None) -> None:
        raise TypeError("metrics.jsonl takes scalars and texts only")

    def write_images(self, step, images) -> None:
        raise TypeError("metrics.jsonl takes scalars and texts only")

    def write_videos(self, step, videos) -> None:
        raise TypeError("metrics.jsonl takes scalars and texts only")

    def write_audios(self, step, audios, *, sample_rate) -> None:
        raise TypeError("metrics.jsonl takes scalars and texts only")

    def write_histograms(self, step, arrays, num_buckets=None) -> None:
        raise TypeError("metrics.jsonl takes scalars and texts only")

    def write_pointcloud(self, step, point_clouds, *, point_colors=None, configs=None) -> None:
        raise TypeError("metrics.jsonl takes scalars and texts only")

    def write_hparams(self, hparams) -> None:
        raise TypeError("metrics.jsonl takes scalars and texts only")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


class Timer:
    """Rates since the last call of `rates`: evaluation and checkpoints do not count, nor does the first step (it compiles).

    parts: processes that read other rows than each other, this one included: audio and tokens are those of all.
    """

    def __init__(self, parts: int = 1):
        self._parts = parts
        self._reset()
        self._first = True

    def _reset(self) -> None:
        self._started, self._excluded, self._waited = time.perf_counter(), 0.0, 0.0
        self._last, self._step_times = self._started, []
        self._steps = self._audio_seconds = self._tokens = self._window_slots = self._windows = (
            self._token_slots
        ) = 0

    @contextlib.contextmanager
    def waiting(self):
        """Time spent waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self):
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._excluded += elapsed
        self._last += elapsed

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        self._steps += 1
        self._audio_seconds += float(batch["window_frames"].sum()) * HOP / SAMPLE_RATE
        self._windows += int((batch["window_frames"] > 0).sum())
        self._window_slots += batch["window_frames"].size
        self._tokens += int((batch["segment_ids"] > 0).sum())
        self._token_slots += batch["segment_ids"].size

    def finished(self) -> None:
        """A step's results are there: its time is that since the one before."""
        now = time.perf_counter()
        self._step_times.append(now - self._last)
        self._last = now

    def rates(self) -> dict[str, float]:
        """Seconds a step (mean, median, 90th percentile, longest); audio seconds and tokens a second, waiting fraction and slots
        filled, taken from this process's rows."""
        elapsed = max(1e-9, time.perf_counter() - self._started - self._excluded)
        steps = max(1, self._steps)
        rates = {
            "step_seconds": elapsed / steps,
            "audio_seconds_per_second": self._parts * self._audio_seconds / elapsed,
            "tokens_per_second": self._parts * self._tokens / elapsed,
            "data_wait_fraction": min(1.0, self._waited / elapsed),
            "window_fill": self._windows / max(1, self._window_slots),
            "token_fill": self._tokens / max(1, self._token_slots),
        }
        if self._step_times:
            median, slow = np.percentile(self._step_times, (50, 90))
            rates |= {
                "step_seconds_p50": median,
                "step_seconds_p90": slow,
                "step_seconds_max": max(self._step_times),
            }
        self._reset()
        if self._first:  # the first step compiles: its rates say nothing
            self._first = False
            return {"first_step_seconds": elapsed}
        return rates


class Profile:
    """A trace of some steps, for TensorBoard's profiler or Perfetto: config.profile "FIRST:LAST", or "" for none."""

    def __init__(self, steps: str, folder: str | os.PathLike):
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        if steps and (not match or not 1 <= int(match[1]) <= int(match[2])):
            raise UserError(
                f"config.profile={steps} is not FIRST:LAST, two step numbers such as 5:8"
            )
        self.first, self.last = map(int, match.groups()) if match else (0, 0)
        self.folder, self._runs = pathlib.Path(folder), False

    def begin(self, step: int) -> None:
        if step == self.first:
            jax.profiler.start_trace(self.folder)
            self._runs = True

    def end(self, step: int, results) -> None:
        """After a step whose results are given; waits for them if it is the last one."""
        if self._runs and step >= self.last:
            jax.block_until_ready(results)
            self.stop()

    def stop(self) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
            logging.info("trace of steps %d to %d: %s", self.first, self.last, self.folder)


# What may change between a run and its continuation: nothing that decides a number.
_FREE = (
    "name",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "mesh",
    "max_skipped",
    "eval",
    "profile",
)


def name_changes(meta: Mapping, config: ConfigDict, data: Mapping[str, str]) -> None:
    """Says aloud what has changed since the checkpoint from which a run goes on: fields of the config, manifests of its data.

    data: {source: fingerprint of its manifest}.
    """
    before, now = _flatten(meta["config"]), _flatten(json.loads(config.to_json_best_effort()))
    for field in sorted(set(before) | set(now)):
        if not field.startswith(_FREE) and before.get(field) != now.get(field):
            logging.warning(
                "config.%s was %r when the run began, it is now %r",
                field,
                before.get(field),
                now.get(field),
            )
    for name, fingerprint in data.items():
        if meta.get("data", {}).get(name, fingerprint) != fingerprint:
            logging.warning(
                "config.data.train.%s: its manifest has changed since the run began, rows are others from here on",
                name,
            )


def _flatten(tree: Mapping, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        out |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return out
