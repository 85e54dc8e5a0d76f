"""Batches of packed rows: loading with Grain, and prefetching to devices."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import grain
import numpy as np

from fastslm_jax.data.rows import PackedRows

_ENDLESS = 1 << 40  # steps; a Grain source needs a length

HostBatch = TypeVar("HostBatch")
DeviceBatch = TypeVar("DeviceBatch")


class _BatchSource:
    """Grain's random-access source: item `step` is this process's part of that step's batch."""

    def __init__(
        self, rows: PackedRows, global_rows: int, process_index: int, process_count: int
    ) -> None:
        self.rows, self.global_rows = rows, global_rows
        self.local_rows = global_rows // process_count
        self.first = process_index * self.local_rows

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = int(step) * self.global_rows + self.first
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
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's batches without end.

    Args:
        rows: the packed rows.
        global_rows: rows per batch over all processes.
        start_row: the global row number to start from.
        process_index: index of this process.
        process_count: number of processes.
        workers: worker processes (0: threads of this process).
        prefetch: batches to prepare in advance.

    Raises:
        ValueError: `global_rows` is not divisible by the number of processes, or `start_row` by
            `global_rows`.
    """
    if global_rows % process_count or start_row % global_rows:
        raise ValueError(
            f"batches of {global_rows} rows from row {start_row} do not divide over "
            f"{process_count} processes"
        )
    source = _BatchSource(rows, global_rows, process_index, process_count)
    dataset = grain.MapDataset.source(source)[start_row // global_rows :]
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=prefetch)
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        )
    return iter(dataset)


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
