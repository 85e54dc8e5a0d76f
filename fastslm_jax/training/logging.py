"""What a training run reports: metrics, rates, traces and the progress bar."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax
from absl import logging
from clu import metric_writers
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from fastslm_jax import chips, devices, outputs
from fastslm_jax.audio import HOP, SAMPLE_RATE
from fastslm_jax.errors import UserError
from fastslm_jax.models import attention
from fastslm_jax.training.wandb_writer import WandbWriter


class JsonLinesWriter:
    """Writes one JSON object per line: {"step": 10, "loss": 1.5, …}.

    Implements the methods of `clu.metric_writers.MetricWriter` that training uses.

    Args:
        resume_step: lines of later steps are dropped, because these steps will run again.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int = 0) -> None:
        self.path = pathlib.Path(path)
        text = ""
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
        kept = [line for line in text.split("\n") if _step_of(line) <= resume_step]
        outputs.write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write({"step": step} | {name: float(value) for name, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write({"step": step, "texts": dict(texts)})

    def _write(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk; name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # truncated when the run was killed


def make_writer(
    workdir: pathlib.Path, resume_step: int, is_first_process: bool, config: ConfigDict
) -> metric_writers.MetricWriter:
    """Writes metrics.jsonl and TensorBoard events, and to Weights & Biases if config.wandb is set.

    Processes other than the first write nothing.
    """
    writers = [
        metric_writers.create_default_writer(
            workdir, just_logging=not is_first_process, asynchronous=False
        )
    ]
    if is_first_process:
        writers.append(JsonLinesWriter(workdir / "metrics.jsonl", resume_step))
        if config.wandb:
            writers.append(WandbWriter(config.wandb, workdir, config.to_dict()))
    return metric_writers.MultiWriter(writers)


class Timer:
    """Rates since the last call of `rates`, excluding evaluation, checkpoints and the first step.

    Args:
        num_readers: groups of processes that read different rows. Each process counts its own
            rows; audio and tokens per second are scaled to all of them.
    """

    def __init__(self, num_readers: int = 1) -> None:
        self._num_readers = num_readers
        self._reset()
        self._is_first = True

    def _reset(self) -> None:
        self._started = self._last = time.perf_counter()
        self._paused = self._waited = 0.0
        self._step_times: list[float] = []
        self._steps = 0
        self._audio_seconds = 0.0
        self._windows = self._window_slots = self._tokens = self._token_slots = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from all rates."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._paused += elapsed
        self._last += elapsed

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        self._steps += 1
        self._audio_seconds += float(batch["window_frames"].sum()) * HOP / SAMPLE_RATE
        self._windows += int((batch["window_frames"] > 0).sum())
        self._window_slots += batch["window_frames"].size
        self._tokens += int((batch["segment_ids"] > 0).sum())
        self._token_slots += batch["segment_ids"].size

    def finished(self) -> None:
        """Marks the end of a step."""
        now = time.perf_counter()
        self._step_times.append(now - self._last)
        self._last = now

    def rates(self) -> dict[str, float]:
        """Seconds per step, audio and tokens per second, waiting fraction, slots filled.

        The first call returns only first_step_seconds, which is mostly compilation.
        """
        elapsed = max(1e-9, time.perf_counter() - self._started - self._paused)
        steps = max(1, self._steps)
        rates = {
            "step_seconds": elapsed / steps,
            "audio_seconds_per_second": self._num_readers * self._audio_seconds / elapsed,
            "tokens_per_second": self._num_readers * self._tokens / elapsed,
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
        if self._is_first:
            self._is_first = False
            return {"first_step_seconds": elapsed}
        return rates


class Profile:
    """A trace of some steps for TensorBoard's profiler or Perfetto.

    Args:
        steps: "FIRST:LAST", or "" for no trace.
    """

    def __init__(self, steps: str, folder: str | os.PathLike) -> None:
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        if steps and (not match or not 1 <= int(match[1]) <= int(match[2])):
            raise UserError(
                f"config.profile={steps} is not FIRST:LAST, two step numbers such as 5:8"
            )
        self.first, self.last = map(int, match.groups()) if match else (0, 0)
        self.folder, self._is_running = pathlib.Path(folder), False

    def begin(self, step: int) -> None:
        if step == self.first:
            jax.profiler.start_trace(self.folder)
            self._is_running = True

    def end(self, step: int, results: Mapping[str, jax.Array]) -> None:
        """Ends the trace after its last step, when the step's results are ready."""
        if self._is_running and step >= self.last:
            jax.block_until_ready(results)
            self.stop()

    def stop(self) -> None:
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
            logging.info("trace of steps %d to %d: %s", self.first, self.last, self.folder)


@dataclasses.dataclass
class StepLog:
    """The bookkeeping of the training loop.

    Call `begin` before a step and `end` after it. Metrics are read one step late, so that the host
    does not wait for the running step; on logged steps they are read immediately.

    Attributes:
        bar: progress bar.
        first_step, last_step: the steps of this run.
        first_row: the number of the first row of `first_step`.
        log_every: steps between lines of metrics; the first and last steps are logged too.
        max_skipped: consecutive non-finite steps that end the run.
        global_batch_size: rows per step.
        flops_per_step: minimum FLOPs of a step (see `flops.minimum`).
        dev_scores: shown in the progress bar.
    """

    writer: metric_writers.MetricWriter
    bar: tqdm
    timer: Timer
    profile: Profile
    mesh: Mesh
    schedule: optax.Schedule
    first_step: int
    last_step: int
    log_every: int
    max_skipped: int
    global_batch_size: int
    flops_per_step: float
    first_row: int = 0
    dev_scores: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pending: collections.deque[tuple[int, Mapping]] = collections.deque()
        self._skipped_total = 0
        self._compile_seconds = 0.0  # of the train step alone, not of evaluation

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the compilation of the train step."""
        before = devices.compiled_so_far()
        yield
        self._compile_seconds = (devices.compiled_so_far() - before).seconds

    def begin(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
        """Before a step on a batch of this process."""
        self.timer.count(batch)
        self.profile.begin(step)

    def end(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """After a step is dispatched.

        Raises:
            UserError: too many consecutive steps were not finite.
        """
        self.profile.end(step, metrics)
        self.bar.update()
        is_logged = step % self.log_every == 0 or step in (self.first_step, self.last_step)
        self._pending.append((step, metrics))
        while len(self._pending) > (0 if is_logged else 1):
            self._check_finite(*self._pending.popleft())
            self.timer.finished()
        if step == self.first_step:
            kernels = collections.Counter(choice.split(":")[0] for choice in attention.CHOICES)
            for kernel, shapes in sorted(kernels.items()):
                logging.info("attention kernel %s for %d shapes", kernel, shapes)
        if is_logged:
            self._write(step, {name: float(x) for name, x in jax.device_get(metrics).items()})

    def _check_finite(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        skipped = int(metrics["skipped"])
        if not skipped:
            return
        self._skipped_total += 1
        logging.warning(
            "step %d: loss or gradients are not finite, step skipped (%d in a row)", step, skipped
        )
        if skipped >= self.max_skipped:
            first = max(self.first_step, step - skipped + 1)
            raise UserError(
                f"{skipped} steps in a row (up to step {step}) had a non-finite loss or gradients: "
                f"check rows {self.rows(first - 1)} to {self.rows(step) - 1} of the data, or lower "
                "config.optimizer.learning_rate"
            )

    def rows(self, step: int) -> int:
        """The number of rows that the run has used after a step: the number of the next row.

        It depends on the batch sizes of all resumes, so it is not `step` times the batch size.
        """
        return self.first_row + (step - self.first_step + 1) * self.global_batch_size

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        rates = self.timer.rates()
        rates |= speed(self.flops_per_step, rates.get("step_seconds"), self.mesh)
        rates |= {
            "compile_seconds": self._compile_seconds,
            "skipped_total": self._skipped_total,
            "rows": self.rows(step),
        }
        learning_rate = float(self.schedule(step - 1))
        self.writer.write_scalars(step, {**metrics, "learning_rate": learning_rate, **rates})
        shown = {name: f"{value:.1f}" for name, value in self.dev_scores.items()}
        self.bar.set_postfix(loss=f"{metrics['loss']:.3f}", **shown)

    def close(self) -> None:
        self.bar.close()
        self.profile.stop()
        self.writer.close()


def speed(flops_per_step: float, step_seconds: float | None, mesh: Mesh) -> dict[str, float]:
    """Model FLOPs per second, and MFU: their fraction of the peak of the mesh's chips.

    MFU is left out if the peak is unknown. All slots of a row count as used.
    """
    if not step_seconds:
        return {}
    rate, chip = flops_per_step / step_seconds, chips.of_device(mesh.devices.flat[0])
    peak = chip and chip.peak_flops * mesh.size / chip.devices
    return {"flops_per_second": rate} | ({"mfu": rate / peak} if peak else {})
