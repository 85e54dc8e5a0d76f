"""FastSLM-4B for two optimizer steps of stage 2, a checkpoint, and a third step after a resume.

    python benchmarks/full_size_step.py [--small] [--dir=/tmp]

Random Whisper-large-v3 and Qwen3-4B folders in bfloat16 (9.4 GB, deleted afterwards) are loaded by
train.py as usual. The recording is one minute of noise with 150 words. Needs Linux, 24 GiB of
memory, 10 GiB of disk, and an otherwise idle machine. Target: a peak of 20 GiB of anonymous memory
(page cache of memory-mapped files is not counted). Last line: one JSON object.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import full_size
import numpy as np
import soundfile
from absl import flags
from banner import print_banner

from fastslm_jax import cli

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[1]
WORDS = "anna bought two red lamps in vienna on friday".split()
LIMIT_GIB = 20.0
# XLA multiplies bfloat16 in float32 on CPUs. This pass would convert the weights of all layers
# before the loop over layers: 18 GiB of temporaries instead of 2.
CONVERT_PER_LAYER = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"
SETTINGS = {
    "init_from": "",
    "data.dev": "",
    "data.workers": 0,
    "data.train.long.join.min_seconds": 30.0,
    "data.row.windows": 2,
    "data.row.tokens": 1024,
    "data.row.labels": 768,
    "mesh.fsdp": 1,
    "global_batch_size": 1,
    "model.window_batch": 1,
    "model.remat": "full",
    "loss_chunk": 128,
    "log_every": 1,
    "optimizer.warmup_steps": 0,
}


def write_recording(scratch: pathlib.Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 60 * 16_000).astype(np.float32)
    soundfile.write(scratch / "noise.wav", samples, 16_000)
    text = " ".join(WORDS[i % len(WORDS)] for i in range(150))
    line = {"audio_filepath": "noise.wav", "duration": 60.0, "text": text, "task": "asr"}
    (scratch / "train.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


def train(scratch: pathlib.Path, steps: int) -> dict[str, float]:
    """Runs train.py up to a step. Returns its seconds and peak anonymous memory in GiB."""
    settings = SETTINGS | {
        "base.whisper": scratch / "whisper",
        "base.llm": scratch / "llm",
        "data.train.long.path": scratch / "train.jsonl",
        "steps": steps,
    }
    command = [sys.executable, "train.py", "--config=configs/stage2_longform.py"]
    command += [f"--workdir={scratch}/run"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} {CONVERT_PER_LAYER}"
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags})
    with full_size.PrivateMemory(process.pid) as memory:
        code = process.wait()
    if code:
        sys.exit(f"train.py exited with code {code}")
    return {"seconds": time.perf_counter() - started, "peak_gib": memory.peak / 2**30}


def main(_: list[str]) -> None:
    print_banner("FastSLM-4B: two train steps, a checkpoint, and a third step after a resume.")
    with tempfile.TemporaryDirectory(dir=FLAGS.dir, prefix="full_size_step.") as folder:
        scratch = pathlib.Path(folder)
        full_size.write_bases(scratch, FLAGS.small)
        write_recording(scratch)
        first, second = train(scratch, steps=2), train(scratch, steps=3)
        lines = (scratch / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    peak = max(first["peak_gib"], second["peak_gib"])
    print(f"{'losses of steps 1 to 3':<40}{' '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"{'load, two steps, checkpoint':<40}{first['seconds']:.1f} s")
    print(f"{'load, restore, one step':<40}{second['seconds']:.1f} s")
    print(f"{'peak anonymous memory':<40}{peak:.2f} GiB (at most {LIMIT_GIB:.0f})")
    report = {
        "losses": losses,
        "first": first,
        "resumed": second,
        "peak_gib": peak,
        "small": FLAGS.small,
    }
    print(json.dumps(report))
    sys.exit(len(losses) != 3 or not np.isfinite(losses).all() or peak > LIMIT_GIB)


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Two layers of each base, to try the benchmark.")
    flags.DEFINE_string("dir", None, "Folder for the files (default: the system's temporary one).")
    cli.run(main)
