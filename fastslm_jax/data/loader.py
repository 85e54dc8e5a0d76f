"""Batches of packed rows: loading with Grain, and prefetching to devices."""

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import grain
import numpy as np

from fastslm_jax.data.rows import PackedRows
from fastslm_jax.errors import UserError

_ENDLESS = 1 << 40  # steps; a Grain source needs a length

HostBatch = TypeVar("HostBatch")
DeviceBatch = TypeVar("DeviceBatch")


class _BatchSource:
    """Grain's random-access source: item `step` is this process's part of that step's batch."""

    def __init__(
        self,
        rows: PackedRows,
        global_rows: int,
        start_row: int,
        process_index: int,
        process_count: int,
    ) -> None:
        self.rows, self.global_rows = rows, global_rows
        self.local_rows = global_rows // process_count
        self.first = start_row + process_index * self.local_rows

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = self.first + int(step) * self.global_rows
        rows = [self.rows[start + i] for i in range(self.local_rows)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(
    rows: PackedRows,
    global_rows: int,
    *,
    start_row: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 4,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Yields this process's batches without end. Close it to end its threads and processes.

    They start at once, so what is done before the first batch is drawn does not wait for data.

    Args:
        rows: the packed rows.
        global_rows: rows per batch over all processes.
        start_row: the global row number to start from: any, whatever the size of the batches.
        process_index: index of this process.
        process_count: number of processes.
        workers: worker processes (0: threads of this process).
        prefetch: batches to prepare in advance.

    Raises:
        UserError: `global_rows` is not divisible by the number of processes.
    """
    if global_rows % process_count:
        raise UserError(
            f"a batch of {global_rows} rows does not divide into {process_count} equal parts, one "
            "for each process; choose another config.global_batch_size"
        )
    source = _BatchSource(rows, global_rows, start_row, process_index, process_count)
    dataset = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=prefetch)
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
            worker_init_fn=_ignore_interrupts,
        )
    iterator = iter(dataset)
    iterator.start_prefetch()
    return iterator


def _ignore_interrupts(worker: int, count: int) -> None:
    """Ctrl-C is sent to all processes of a terminal; the main one ends its workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prefetch_to_devices(
    batches: Iterable[HostBatch], put: Callable[[HostBatch], DeviceBatch]
) -> Iterator[tuple[HostBatch, DeviceBatch]]:
    """Yields (batch, put(batch)), calling `put` one batch ahead.

    `put` starts the copy to the devices, which then overlaps with the previous step.
    """
    batches = iter(batches)
    batch = next(batches)
    ready = batch, put(batch)
    for batch in batches:
        following = batch, put(batch)
        yield ready
        ready = following
    yield ready
