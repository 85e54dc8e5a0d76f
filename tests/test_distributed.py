"""Which rows a process reads, and flags that do not fit together. test_layouts.py runs two processes."""

import types

import jax
import numpy as np
import pytest

from fastslm_jax import distributed
from fastslm_jax.errors import UserError


def mesh_of(processes: list[int], shape: tuple[int, int, int]):
    """A mesh whose devices belong to the processes given, in order."""
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
        (
            [0, 0, 1, 1] * 2,
            (2, 1, 4),
            [(0, 1), (0, 1)],
        ),  # tensor crosses processes: both read all rows
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 1, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (
            [1, 0, 1, 0],
            (4, 1, 1),
            [(1, 2), (0, 2)],
        ),  # a pod's mesh need not follow the processes' numbers
    ],
)
def test_every_row_is_read_by_who_has_its_device(monkeypatch, processes, shape, parts):
    for process, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert distributed.rows_of_process(mesh_of(processes, shape)) == part


def test_processes_that_share_some_rows_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(
        UserError,
        match=r"processes share some of their rows only; choose config.mesh.tensor as a divisor",
    ):
        distributed.rows_of_process(mesh_of([0, 0, 0, 1, 1, 1], (3, 1, 2)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("localhost:1234", None, None),
            "--coordinator, --num_processes and --process_id go together: give all three",
        ),
        ((None, 2, 0), "--coordinator, --num_processes and --process_id go together"),
        (
            ("localhost", 2, 0),
            "--coordinator=localhost --num_processes=2 --process_id=0: the coordinator is HOST:PORT",
        ),
        (("localhost:1234", 2, 2), "processes are numbered from 0"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*flags)


def test_without_a_cluster_there_is_one_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **__: pytest.fail("there is nobody to join")
    )
    distributed.initialize()
    monkeypatch.setenv("JAX_PLATFORMS", "")

    def nobody():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    distributed.initialize()
    assert jax.process_count() == 1
