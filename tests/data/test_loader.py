"""Batches: the same rows on any number of processes and workers, and from any start row.

One test runs this file as a program, in two processes.
"""

import hashlib
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from absl import flags

from fastslm_jax import sharding
from fastslm_jax.audio import WindowSpec
from fastslm_jax.data import loader, prompts
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.packing import RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows
from fastslm_jax.errors import UserError


def take(count, batches):
    return list(itertools.islice(batches, count))


def assert_equal(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_batches_are_consecutive_rows(make_rows):
    rows = make_rows()
    first, second = take(2, loader.batches(rows, 2))
    for batch, numbers in ((first, (0, 1)), (second, (2, 3))):
        for i, number in enumerate(numbers):
            assert_equal({name: value[i] for name, value in batch.items()}, rows[number])


def test_two_processes_get_the_halves_of_every_batch(make_rows):
    whole = take(2, loader.batches(make_rows(), 4))
    parts = [
        take(2, loader.batches(make_rows(), 4, process_index=index, process_count=2))
        for index in range(2)
    ]
    for step in range(2):
        joined = {
            name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]
        }
        assert_equal(joined, whole[step])


def test_batches_resume_at_the_start_row(make_rows):
    whole = take(4, loader.batches(make_rows(), 2))
    resumed = take(2, loader.batches(make_rows(), 2, start_row=4))
    for batch, expected in zip(resumed, whole[2:], strict=True):
        assert_equal(batch, expected)


def test_worker_processes_give_the_same_batches(make_rows):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])  # Grain's workers require parsed flags
    from_threads = take(3, loader.batches(make_rows(), 2, workers=0))
    from_workers = take(3, loader.batches(make_rows(), 2, workers=4, prefetch=1))
    for batch, expected in zip(from_workers, from_threads, strict=True):
        assert_equal(batch, expected)


def test_the_first_batch_is_prepared_before_it_is_drawn(make_rows, monkeypatch):
    started, build = threading.Event(), PackedRows.__getitem__

    def watched(rows, row):
        started.set()
        return build(rows, row)

    monkeypatch.setattr(PackedRows, "__getitem__", watched)
    feed = loader.batches(make_rows(), 2)
    assert started.wait(timeout=30)
    feed.close()


def test_a_batch_must_divide_over_the_processes(make_rows):
    message = "a batch of 4 rows does not divide into 3 equal parts, one for each process"
    with pytest.raises(UserError, match=message):
        loader.batches(make_rows(), 4, process_count=3)


def test_any_row_may_be_the_first(make_rows):
    """A run may go on with batches of another size: every row is used once."""
    rows = make_rows()
    (first,) = take(1, loader.batches(rows, 4))
    second = take(2, loader.batches(rows, 3, start_row=4))
    parts = [
        take(1, loader.batches(rows, 4, start_row=10, process_index=i, process_count=2))[0]
        for i in range(2)
    ]
    joined = {
        name: np.concatenate([batch[name] for batch in (first, *second, *parts)]) for name in first
    }
    for number in range(14):
        assert_equal({name: value[number] for name, value in joined.items()}, rows[number])


def test_batches_are_put_on_devices_one_step_ahead():
    put = []
    pairs = loader.prefetch_to_devices(
        iter("abc"), lambda batch: put.append(batch) or batch.upper()
    )
    assert next(pairs) == ("a", "A")
    assert put == ["a", "b"]
    assert list(pairs) == [("b", "B"), ("c", "C")]


# ---- Two real processes

ROOT = pathlib.Path(__file__).parents[2]
GLOBAL_ROWS, STEPS = 4, 2


def mixed_rows(folder: str, tokenizer: str) -> PackedRows:
    prompt_tokenizer = prompts.PromptTokenizer(prompts.load_tokenizer(tokenizer))
    sources = [
        MixtureSource(folder),
        MixtureSource(folder, ("asr",), 0.5, LongForm(4.0, 9.0, "semantic")),
    ]
    return PackedRows(
        sources, RowShape(12, 640, 384), WindowSpec(frames=100), 3, prompt_tokenizer, seed=3
    )


def row_hashes(arrays: dict[str, np.ndarray], first: int) -> dict[int, str]:
    """{global row number: hash} of a batch whose first row has the number `first`."""
    hashes = {}
    for i in range(len(next(iter(arrays.values())))):
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(name.encode() + np.ascontiguousarray(arrays[name][i]).tobytes())
        hashes[first + i] = digest.hexdigest()
    return hashes


def device_row_hashes(rows: PackedRows, start_row: int, workers: int) -> dict[int, str]:
    """{global row number: hash} of the rows on this process's devices, over STEPS batches."""
    mesh, hashes = sharding.make_mesh(), {}
    batches = loader.batches(
        rows,
        GLOBAL_ROWS,
        start_row=start_row,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=workers,
        prefetch=1,
    )
    for step in range(STEPS):
        arrays = sharding.shard_batch(next(batches), mesh)
        for number in range(len(mesh.local_devices)):
            shards = {name: array.addressable_shards[number] for name, array in arrays.items()}
            (index,) = {shard.index[0].start or 0 for shard in shards.values()}
            first = start_row + step * GLOBAL_ROWS + index
            hashes |= row_hashes({name: shard.data for name, shard in shards.items()}, first)
    return hashes


def main(process_index: str, address: str, folder: str, tokenizer: str) -> None:
    """One of the two processes: prints {global row number: hash} of a run and of a resumed run."""
    flags.FLAGS(["test_loader"])
    jax.distributed.initialize(address, 2, int(process_index))
    rows = mixed_rows(folder, tokenizer)
    from_start = device_row_hashes(rows, 0, workers=0)
    resumed = device_row_hashes(rows, GLOBAL_ROWS * STEPS, workers=1)
    print(json.dumps(from_start | resumed))


def test_two_processes_load_the_rows_of_one(corpus, tokenizer_folder, tmp_path):
    """Also when a run with one process is resumed with two, and vice versa."""
    import_corpus(f"jsonl:{corpus}/train.jsonl", tmp_path / "imported", Settings(shard_clips=4))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    arguments = [address, str(tmp_path / "imported"), str(tokenizer_folder)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(index), *arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]

    rows, expected = mixed_rows(str(tmp_path / "imported"), str(tokenizer_folder)), {}
    for step, batch in enumerate(take(2 * STEPS, loader.batches(rows, GLOBAL_ROWS))):
        expected |= row_hashes(batch, step * GLOBAL_ROWS)
    start_row, resumed = GLOBAL_ROWS * STEPS, {}
    batches = loader.batches(rows, GLOBAL_ROWS, start_row=start_row)
    for step, batch in enumerate(take(STEPS, batches)):
        resumed |= row_hashes(batch, start_row + step * GLOBAL_ROWS)
    assert resumed == {row: value for row, value in expected.items() if row >= start_row}

    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    parts = [
        {int(row): value for row, value in json.loads(out.splitlines()[-1]).items()}
        for out, _ in outputs
    ]
    assert [sorted(part) for part in parts] == [
        [0, 1, 4, 5, 8, 9, 12, 13],
        [2, 3, 6, 7, 10, 11, 14, 15],
    ]
    assert parts[0] | parts[1] == expected
    assert len(set(expected.values())) > 12  # in a small corpus, a row may occur twice


if __name__ == "__main__":
    main(*sys.argv[1:])
