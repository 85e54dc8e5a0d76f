"""The rows of each process, and inconsistent flags. test_layouts.py runs two processes."""

import json
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


# -------------------------------------------------------------------------- do the processes agree?


def test_the_process_that_differs_from_most_others_is_named():
    usual = json.dumps({"config.seed": 0, "config.name": "a", "--workdir": "runs/a"})
    other = json.dumps({"config.seed": 1, "config.name": "a", "--workdir": "runs/a"})
    assert distributed.difference([usual] * 4) == ""
    assert (
        distributed.difference([usual, other])
        == "process 1 differs from process 0: config.seed is 1 and not 0"
    )
    assert (
        distributed.difference([other, usual, usual])
        == "process 0 differs from process 1: config.seed is 1 and not 0"
    )
    assert (
        distributed.difference([usual, usual, usual, other, other])
        == "processes 3, 4 differ from process 0: config.seed is 1 and not 0"
    )


def test_what_differs_is_named_and_cut():
    """A field that one process lacks, a long value, and more than three differences."""
    before = json.dumps({"a": 1, "b": 1, "c": "x" * 100, "d": 1, "e": 1})
    after = json.dumps({"b": 2, "c": "y", "d": 2, "e": 2})
    assert distributed.difference([before, after]) == (
        "process 1 differs from process 0: a is null and not 1, b is 2 and not 1, "
        f'c is "y" and not "{"x" * 58}… (and 2 more)'
    )


def test_devices_per_process():
    distributed.check_device_counts([0, 0, 1, 1, 2, 2])
    with pytest.raises(UserError, match="process 2 has 1 devices, and process 0 has 2: all"):
        distributed.check_device_counts([0, 0, 1, 1, 2])


def test_an_error_of_one_process_is_raised_by_all(monkeypatch):
    distributed.check_equal({"a": 1})  # one process agrees with itself
    with (
        pytest.raises(UserError, match=r"^a.jsonl: no such manifest$"),
        distributed.shared_errors(),
    ):
        raise UserError("a.jsonl: no such manifest")
    monkeypatch.setattr(distributed, "gather", lambda own: [own, "", "a.jsonl: no such manifest"])
    message = r"^process 2: a.jsonl: no such manifest$"
    with pytest.raises(UserError, match=message), distributed.shared_errors():
        pass


def test_the_software_of_a_process():
    found = distributed.software()
    assert found["the version of jax"] == jax.__version__
    assert len(found["the code of fastslm_jax"]) == 12


# ------------------------------------------------------------------------------------------- flags


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
