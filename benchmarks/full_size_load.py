"""Load and export of a full-size model: seconds, GB/s and private memory.

    python benchmarks/full_size_load.py [--small] [--dir=/tmp]

Writes random Whisper-large-v3 and Qwen3-4B folders in bfloat16 (9.4 GB, and as much again for the
export; all are deleted afterwards), loads them sharded over 8 virtual CPU devices, and exports the
model to a folder for PyTorch. Private memory is anonymous memory; page cache of memory-mapped files
is not counted. Last line: one JSON object.

Targets: loading peaks at 1.3 times the parameters' bytes and takes at most 3 times as long as
reading the files into memory; the export peaks at most 2 GiB above the loaded parameters.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

import gc
import json
import tempfile
import time

import full_size
import jax
import numpy as np
from absl import flags
from banner import print_banner
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import cli, sharding
from fastslm_jax.convert import exporting
from fastslm_jax.errors import UserError
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import pretrained

FLAGS = flags.FLAGS
GIB = 2**30


def read_seconds(files: list[pathlib.Path]) -> float:
    """Time to read all files into memory, where they stay until the last is read."""
    started, contents = time.perf_counter(), []
    for file in files:
        contents.append(np.empty(file.stat().st_size, np.uint8))
        with open(file, "rb") as stream:
            position = 0
            # Linux reads at most 2 GiB at a time.
            while count := stream.readinto(contents[-1][position:]):
                position += count
        if position != contents[-1].size:
            raise UserError(f"{file}: read only {position} of {contents[-1].size} bytes")
    return time.perf_counter() - started


def measure(scratch: pathlib.Path) -> dict:
    config = full_size.write_bases(scratch, FLAGS.small)
    setup = experiment.build(config)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    abstract = experiment.abstract_params(setup.model, config.model.base_dtype, mesh)
    base = {path: leaf for path, leaf in abstract.items() if experiment.is_base(path)}
    tree = unflatten_dict(base, sep="/")

    files = sorted(scratch.glob("*/*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)
    print(f"{file_bytes / 1e9:.1f} GB written", flush=True)
    read_seconds(files)  # into the page cache
    reading = read_seconds(files)
    gc.collect()
    with full_size.PrivateMemory() as load_memory:
        started = time.perf_counter()
        params = {
            "encoder": pretrained.load_whisper(scratch / "whisper", tree["encoder"]),
            "llm": pretrained.load_decoder(scratch / "llm", tree["llm"]),
        }
        load_seconds = time.perf_counter() - started
    parameter_bytes = sum(leaf.nbytes for leaf in flatten_dict(params).values())
    print(f"loaded in {load_seconds:.1f} s", flush=True)

    checkpoints = Checkpoints(scratch / "run")
    ours = {
        path: np.zeros(leaf.shape, leaf.dtype)
        for path, leaf in abstract.items()
        if path not in base
    }
    meta = {"config": config.to_dict(), "row": 0, "bases": setup.fingerprints()}
    checkpoints.save(1, ours, {"step": np.int32(1)}, meta)
    checkpoints.wait()
    checkpoints.close()
    del ours
    gc.collect()
    with full_size.PrivateMemory() as export_memory:
        started = time.perf_counter()
        tensors = exporting.export(scratch / "run", scratch / "hf", "hf")
        export_seconds = time.perf_counter() - started
    jax.block_until_ready(params)  # keeps the parameters alive during the export
    return {
        "devices": jax.device_count(),
        "parameters_gib": parameter_bytes / GIB,
        "file_gb": file_bytes / 1e9,
        "read_seconds": reading,
        "load_seconds": load_seconds,
        "gb_per_second": file_bytes / 1e9 / load_seconds,
        "load_over_read": load_seconds / reading,
        "private_before_gib": load_memory.before / GIB,
        "peak_private_gib": load_memory.peak / GIB,
        "peak_over_parameters": load_memory.peak / parameter_bytes,
        "export_seconds": export_seconds,
        "export_tensors": len(tensors),
        "export_peak_gib_above": (export_memory.peak - export_memory.before) / GIB,
    }


def main(_: list[str]) -> None:
    print_banner("Load and export of a full-size model against reading its files once.")
    with tempfile.TemporaryDirectory(dir=FLAGS.dir, prefix="full_size_load.") as scratch:
        report = measure(pathlib.Path(scratch))
    speed = f"{report['load_seconds']:.2f} s, {report['gb_per_second']:.2f} GB/s"
    rows = {
        "parameters": f"{report['parameters_gib']:.2f} GiB",
        "reading the files once": f"{report['read_seconds']:.2f} s",
        "loading onto 8 devices": speed,
        "  / reading": f"{report['load_over_read']:.2f} (at most 3)",
        "  peak private memory": f"{report['peak_private_gib']:.2f} GiB",
        "  / parameters": f"{report['peak_over_parameters']:.2f} (at most 1.3)",
        "export to PyTorch": f"{report['export_seconds']:.2f} s",
        "  above the loaded parameters": f"{report['export_peak_gib_above']:.2f} GiB (at most 2)",
    }
    for name, value in rows.items():
        print(f"{name:<32}{value}")
    print(json.dumps(report))


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Two layers of each base, to try the benchmark.")
    flags.DEFINE_string("dir", None, "Folder for the files (default: the system's temporary one).")
    cli.run(main)
