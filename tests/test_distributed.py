"""The rows of each process, and inconsistent flags. test_layouts.py runs two processes."""

import types

import jax
import numpy as np
import pytest

from fastslm_jax import distributed
from fastslm_jax.errors import UserError


def mesh_of(processes: list[int], shape: tuple[int, int, int]) -> types.SimpleNamespace:
    """A mesh whose i-th device belongs to process `processes[i]`."""
    devices = np.empty(len(processes), object)
    devices[:] = [types.SimpleNamespace(process_index=process) for process in processes]
    return types.SimpleNamespace(
        devices=devices.reshape(shape),
        shape=dict(zip(("data", "fsdp", "tensor"), shape, strict=True)),
    )


@pytest.mark.parametrize(
    ("processes", "shape", "parts"),
    [
        ([0] * 8, (2, 2, 2), [(0, 1)]),
        ([0] * 4 + [1] * 4, (1, 8, 1), [(0, 2), (1, 2)]),
        ([0] * 4 + [1] * 4, (1, 4, 2), [(0, 2), (1, 2)]),
        # The tensor axis spans both processes, so both read all rows.
        ([0, 0, 1, 1] * 2, (2, 1, 4), [(0, 1), (0, 1)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 1, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        # The mesh of a pod may not be in the order of the processes.
        ([1, 0, 1, 0], (4, 1, 1), [(1, 2), (0, 2)]),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(monkeypatch, processes, shape, parts):
    for process, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert distributed.rows_of_process(mesh_of(processes, shape)) == part


def test_partly_overlapping_rows_are_an_error(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    message = "the rows of some processes overlap only partly; choose a config.mesh.tensor"
    with pytest.raises(UserError, match=message):
        distributed.rows_of_process(mesh_of([0, 0, 0, 1, 1, 1], (3, 1, 2)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("localhost:1234", None, None),
            "--coordinator, --num_processes and --process_id must be set together",
        ),
        ((None, 2, 0), "--coordinator, --num_processes and --process_id must be set together"),
        (
            ("localhost", 2, 0),
            "--num_processes=2 --process_id=0: the coordinator must be HOST:PORT",
        ),
        (("localhost:1234", 2, 2), "the process id must be from 0 to num_processes - 1"),
    ],
)
def test_inconsistent_flags(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*flags)


def test_without_a_cluster_there_is_one_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **__: pytest.fail("no cluster to connect to")
    )
    distributed.initialize()
    monkeypatch.setenv("JAX_PLATFORMS", "")

    def no_cluster():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    distributed.initialize()
    assert jax.process_count() == 1
