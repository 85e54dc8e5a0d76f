"""The feed on two real processes: the same global rows, byte for byte, as on one; also after a restart on another number.

Run as a program, this file is one of the processes.
"""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
from absl import flags

from fastslm_jax import sharding
from fastslm_jax.audio import WindowSpec
from fastslm_jax.data import prompts
from fastslm_jax.data import rows as pipeline
from fastslm_jax.data.ingest import shards as ingest
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.packing import RowShape

ROOT = pathlib.Path(__file__).parents[2]
GLOBAL_ROWS, STEPS = 4, 2


def make_rows(folder: str, tokenizer: str) -> pipeline.PackedRows:
    encoder = prompts.PromptTokenizer(prompts.load_tokenizer(tokenizer))
    sources = [
        pipeline.MixtureSource(folder),
        pipeline.MixtureSource(folder, ("asr",), 0.5, LongForm(4.0, 9.0, "semantic")),
    ]
    return pipeline.PackedRows(
        sources, RowShape(12, 640, 384), WindowSpec(frames=100), 3, encoder, seed=3
    )


def digests(arrays: dict[str, np.ndarray], first: int) -> dict[int, str]:
    """A hash of each row of a batch that begins at the global row `first`."""
    hashes = {}
    for place in range(len(next(iter(arrays.values())))):
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(name.encode() + np.ascontiguousarray(arrays[name][place]).tobytes())
        hashes[first + place] = digest.hexdigest()
    return hashes


def global_rows(rows: pipeline.PackedRows, start_row: int, workers: int) -> dict[int, str]:
    """Rows that lie on this process's devices once its batches became global arrays."""
    mesh, hashes = sharding.make_mesh(), {}
    batches = pipeline.batches(
        rows, GLOBAL_ROWS, start_row=start_row, process_index=jax.process_index(), process_count=jax.process_count(),
        workers=workers, prefetch=1,
    )  # fmt: skip
    for step in range(STEPS):
        arrays = sharding.shard_batch(next(batches), mesh)
        for number in range(len(mesh.local_devices)):
            shards = {name: array.addressable_shards[number] for name, array in arrays.items()}
            (place,) = {shard.index[0].start or 0 for shard in shards.values()}
            first = start_row + step * GLOBAL_ROWS + place
            hashes |= digests({name: shard.data for name, shard in shards.items()}, first)
    return hashes


def main(index: str, address: str, folder: str, tokenizer: str) -> None:
    flags.FLAGS(["feed"])
    jax.distributed.initialize(address, 2, int(index))
    rows = make_rows(folder, tokenizer)
    from_the_start = global_rows(rows, 0, workers=0)
    resumed = global_rows(rows, GLOBAL_ROWS * STEPS, workers=1)  # where another run stopped
    print(json.dumps(from_the_start | resumed))


def test_two_processes_feed_the_rows_of_one(corpus, tokenizer_folder, tmp_path):
    ingest.import_corpus(
        f"jsonl:{corpus}/train.jsonl", tmp_path / "imported", ingest.Settings(shard_clips=4)
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    arguments = [address, str(tmp_path / "imported"), str(tokenizer_folder)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(index), *arguments], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]  # fmt: skip
    rows, expected = make_rows(str(tmp_path / "imported"), str(tokenizer_folder)), {}
    one = pipeline.batches(rows, GLOBAL_ROWS)
    for step in range(2 * STEPS):
        expected |= digests(next(one), step * GLOBAL_ROWS)
    after_two = {}  # one process goes on where two stopped
    for step, batch in zip(
        range(STEPS),
        pipeline.batches(rows, GLOBAL_ROWS, start_row=GLOBAL_ROWS * STEPS),
        strict=False,
    ):
        after_two |= digests(batch, (STEPS + step) * GLOBAL_ROWS)
    assert after_two == {
        row: digest for row, digest in expected.items() if row >= GLOBAL_ROWS * STEPS
    }

    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    parts = [
        {int(row): digest for row, digest in json.loads(out.splitlines()[-1]).items()}
        for out, _ in outputs
    ]
    assert [sorted(part) for part in parts] == [
        [0, 1, 4, 5, 8, 9, 12, 13],
        [2, 3, 6, 7, 10, 11, 14, 15],
    ]
    assert parts[0] | parts[1] == expected
    assert len(set(expected.values())) > 12  # the corpus is small: a row or two come twice


if __name__ == "__main__":
    main(*sys.argv[1:])
