"""Loads and exports a model of full size: seconds, GB/s and private memory.

    python benchmarks/full_size_load.py [--small] [--dir=/tmp]

Writes random Whisper-large-v3 and Qwen3-4B folders in bfloat16 (9.4 GB, and as much again for the export; all deleted after),
loads them sharded over 8 virtual CPU devices, and exports the model to a folder for PyTorch. Private memory is anonymous
memory: page cache of mapped files does not count. The loading is to take at most 1.3 times the parameters' bytes and at most
3 times as long as reading the files into memory; the export at most 2 GiB above the loaded parameters.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
if __name__ == "__main__":  # full_size_step.py takes functions from here
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

import gc
import json
import shutil
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax import cli, sharding
from fastslm_jax import config as config_lib
from fastslm_jax.convert import exporting
from fastslm_jax.errors import UserError
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import Tensor, write_sharded

FLAGS = flags.FLAGS
WHISPER = {  # openai/whisper-large-v3
    "model_type": "whisper",
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
QWEN3 = {  # Qwen/Qwen3-4B
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
SMALL = {"encoder_layers": 2, "num_hidden_layers": 2, "vocab_size": 4096}


class PrivateMemory:
    """The most anonymous memory of this process while the block runs, in bytes."""

    def __enter__(self):
        self.before = self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())

    def _watch(self):
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        status = pathlib.Path("/proc/self/status")
        if not status.exists():
            raise UserError("this benchmark reads its memory from /proc, which only Linux has")
        return next(
            1024 * int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith("RssAnon")
        )


def write_folder(folder: pathlib.Path, config: dict, leaves: dict, layout: engine.Layout) -> None:
    """A base with random bfloat16 weights, in shards of up to 4 GiB."""
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)

    def random(shape):
        return lambda: np.resize(block, shape)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = []
    for tensor in engine.tensors(leaves, layout):
        tensors.append(
            Tensor(tensor.key, tensor.shape, np.dtype(ml_dtypes.bfloat16), random(tensor.shape))
        )
    write_sharded(folder, tensors)


def write_tokenizer(folder: pathlib.Path) -> None:
    """The least that an export needs: chat markers and a template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|im_end|>": 0, "<|unk|>": 1}, unk_token="<|unk|>")
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|unk|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)


def read_once(files: list[pathlib.Path]) -> float:
    """Seconds that reading the files into memory takes, all of them held at the end."""
    held, started = [], time.perf_counter()
    for file in files:
        held.append(np.empty(file.stat().st_size, np.uint8))
        with open(file, "rb") as stream:
            position = 0
            while count := stream.readinto(
                held[-1][position:]
            ):  # Linux reads at most 2 GiB at a time
                position += count
        if position != held[-1].size:
            raise UserError(f"{file}: could not be read to its end")
    return time.perf_counter() - started


def main(_):
    sizes = SMALL if FLAGS.small else {}
    whisper, llm = (
        {name: sizes.get(name, value) for name, value in config.items()}
        for config in (WHISPER, QWEN3)
    )
    with tempfile.TemporaryDirectory(dir=FLAGS.dir, prefix="full_size_load.") as scratch:
        report = measure(pathlib.Path(scratch), whisper, llm)
    rows = [
        ("parameters", f"{report['parameters_gib']:.2f} GiB"),
        ("reading the files once", f"{report['read_seconds']:.2f} s"),
        (
            "loading onto 8 devices",
            f"{report['load_seconds']:.2f} s, {report['gb_per_second']:.2f} GB/s",
        ),
        ("  over reading", f"{report['load_over_read']:.2f} (at most 3)"),
        ("  peak private memory", f"{report['peak_private_gib']:.2f} GiB"),
        ("  over the parameters", f"{report['peak_over_parameters']:.2f} (at most 1.3)"),
        ("export to PyTorch", f"{report['export_seconds']:.2f} s"),
        ("  above the loaded parameters", f"{report['export_peak_gib_above']:.2f} GiB (at most 2)"),
    ]
    for name, value in rows:
        print(f"{name:<32}{value}")
    print(json.dumps(report))


def measure(scratch: pathlib.Path, whisper: dict, llm: dict) -> dict:
    config = config_lib.full_size()
    config.base.whisper, config.base.llm = str(scratch / "whisper"), str(scratch / "llm")
    for name, base in (("whisper", whisper), ("llm", llm)):
        (scratch / name).mkdir()
        (scratch / name / "config.json").write_text(json.dumps(base))
    setup = experiment.build(config, weights=False)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    abstract = experiment.abstract_params(setup.model, config.model.base_dtype, mesh)
    parts = {
        name: {
            path.removeprefix(f"{name}/"): leaf
            for path, leaf in abstract.items()
            if path.startswith(f"{name}/")
        }
        for name in ("encoder", "llm")
    }
    base_llm = {
        path: leaf for path, leaf in parts["llm"].items() if experiment.is_base(f"llm/{path}")
    }
    for name, base, leaves, layout in (
        ("whisper", whisper, parts["encoder"], layouts.hf_whisper()),
        ("llm", llm, base_llm, layouts.hf_qwen3()),
    ):
        shutil.rmtree(scratch / name)
        write_folder(scratch / name, base, leaves, layout)
    write_tokenizer(scratch / "llm")

    files = sorted(scratch.glob("*/*.safetensors"))
    file_bytes = sum(file.stat().st_size for file in files)
    read_once(files)
    read_seconds = read_once(files)
    gc.collect()
    with PrivateMemory() as loading:
        started = time.perf_counter()
        params = {
            "encoder": pretrained.load_whisper(
                scratch / "whisper", unflatten_dict(parts["encoder"], sep="/")
            ),
            "llm": pretrained.load_qwen3(scratch / "llm", unflatten_dict(base_llm, sep="/")),
        }
        load_seconds = time.perf_counter() - started
    parameter_bytes = sum(leaf.nbytes for leaf in flatten_dict(params).values())

    checkpoints = Checkpoints(scratch / "run")
    ours = {
        path: np.zeros(leaf.shape, leaf.dtype)
        for path, leaf in abstract.items()
        if not experiment.is_base(path)
    }
    meta = {"config": config.to_dict(), "row": 0, "bases": setup.fingerprints()}
    checkpoints.save(1, ours, {"step": np.int32(1)}, meta)
    checkpoints.wait()
    checkpoints.close()
    del ours
    gc.collect()
    with PrivateMemory() as exporting_memory:
        started = time.perf_counter()
        tensors = exporting.export(scratch / "run", scratch / "hf", "hf")
        export_seconds = time.perf_counter() - started
    jax.block_until_ready(params)  # they were there all the time
    return {
        "devices": jax.device_count(),
        "parameters_gib": parameter_bytes / 2**30,
        "file_gb": file_bytes / 1e9,
        "read_seconds": read_seconds,
        "load_seconds": load_seconds,
        "gb_per_second": file_bytes / 1e9 / load_seconds,
        "load_over_read": load_seconds / read_seconds,
        "private_before_gib": loading.before / 2**30,
        "peak_private_gib": loading.peak / 2**30,
        "peak_over_parameters": loading.peak / parameter_bytes,
        "export_seconds": export_seconds,
        "export_tensors": len(tensors),
        "export_peak_gib_above": (exporting_memory.peak - exporting_memory.before) / 2**30,
    }


if __name__ == "__main__":
    flags.DEFINE_bool(
        "small", False, "Two layers of each and a small vocabulary: to try the benchmark itself."
    )
    flags.DEFINE_string(
        "dir", None, "Where the folders are written (default: the system's temporary folder)."
    )
    cli.run(main)
