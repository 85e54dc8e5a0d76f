"""FastSLM-4B for real, once: two optimiser steps of stage 2 through train.py, a checkpoint, and a third step after a resume.

    python benchmarks/full_size_step.py [--small] [--dir=/tmp]

Needs Linux, 24 GiB of memory, 10 GiB of disk, and the whole machine. Random Whisper-large-v3 and Qwen3-4B folders in bfloat16
(9.4 GB, deleted after) are loaded through the normal path; the recording is one minute of noise with 150 words. The target is a
peak of 20 GiB of anonymous memory (page cache of mapped files does not count). Last line: one JSON object.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import numpy as np
import soundfile
from absl import flags
from full_size_load import QWEN3, SMALL, WHISPER, write_folder

from fastslm_jax import cli
from fastslm_jax import config as config_lib
from fastslm_jax.training import experiment
from fastslm_jax.weights import layouts

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = ROOT / "assets/demo_llm"
LIMIT_GIB = 20.0
# XLA on CPU multiplies bfloat16 in float32. Unless this pass is off, it converts all layers' weights before the loop over layers:
# 18 GiB of temporaries instead of 2.
ONE_LAYER_AT_A_TIME = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"


def write_bases(scratch: pathlib.Path, whisper: dict, llm: dict) -> None:
    """scratch/whisper and scratch/llm: random weights in bfloat16, and the demo's tokenizer (its ids fit any larger model)."""
    config = config_lib.full_size()
    config.base.whisper, config.base.llm = str(scratch / "whisper"), str(scratch / "llm")
    for name, base in (("whisper", whisper), ("llm", llm)):
        (scratch / name).mkdir()
        (scratch / name / "config.json").write_text(json.dumps(base))
    model = experiment.build(config, weights=False).model
    leaves = {
        path: leaf
        for path, leaf in experiment.abstract_params(model, "bfloat16").items()
        if experiment.is_base(path)
    }
    for name, prefix, base, layout in (
        ("whisper", "encoder/", whisper, layouts.hf_whisper()),
        ("llm", "llm/", llm, layouts.hf_qwen3()),
    ):
        shutil.rmtree(scratch / name)
        part = {
            path.removeprefix(prefix): leaf
            for path, leaf in leaves.items()
            if path.startswith(prefix)
        }
        write_folder(scratch / name, base, part, layout)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / file, scratch / "llm")


def write_recording(scratch: pathlib.Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 60 * 16_000).astype(np.float32)
    soundfile.write(scratch / "noise.wav", samples, 16_000)
    text = " ".join(
        "anna bought two red lamps in vienna on friday".split()[i % 9] for i in range(150)
    )
    line = {"audio_filepath": "noise.wav", "duration": 60.0, "text": text, "task": "asr"}
    (scratch / "train.jsonl").write_text(json.dumps(line) + "\n")


def train(scratch: pathlib.Path, steps: int) -> dict:
    """train.py up to a step. Returns seconds, and the peak of its anonymous memory in GiB."""
    row = {"windows": 2, "tokens": 1024, "labels": 768}
    settings = {
        "base.whisper": scratch / "whisper", "base.llm": scratch / "llm", "init_from": "", "data.dev": "", "data.workers": 0,
        "data.train.long.path": scratch / "train.jsonl", "data.train.long.join.min_seconds": 30.0, "mesh.fsdp": 1,
        "global_batch_size": 1, "model.window_batch": 1, "model.remat": "full", "loss_chunk": 128, "steps": steps, "log_every": 1,
        "optimizer.warmup_steps": 0, **{f"data.row.{name}": value for name, value in row.items()},
    }  # fmt: skip
    command = [
        sys.executable,
        "train.py",
        "--config=configs/stage2_longform.py",
        f"--workdir={scratch}/run",
    ]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_LAYER_AT_A_TIME}"
    }
    started, peak, done = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            peak = max(
                [
                    peak,
                    *(
                        1024 * int(line.split()[1])
                        for line in status.splitlines()
                        if line.startswith("RssAnon")
                    ),
                ]
            )

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(f"train.py ended with {code}")
    return {"seconds": time.perf_counter() - started, "peak_gib": peak / 2**30}


def main(_):
    sizes = SMALL if FLAGS.small else {}
    whisper, llm = (
        {name: sizes.get(name, value) for name, value in config.items()}
        for config in (WHISPER, QWEN3)
    )
    with tempfile.TemporaryDirectory(dir=FLAGS.dir, prefix="full_size_step.") as folder:
        scratch = pathlib.Path(folder)
        write_bases(scratch, whisper, llm)
        write_recording(scratch)
        first, second = train(scratch, steps=2), train(scratch, steps=3)
        lines = [
            json.loads(line) for line in (scratch / "run/metrics.jsonl").read_text().splitlines()
        ]
    losses = [line["loss"] for line in lines if "loss" in line]
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
    flags.DEFINE_bool(
        "small", False, "Two layers of each and a small vocabulary: to try the benchmark itself."
    )
    flags.DEFINE_string(
        "dir", None, "Where the folders are written (default: the system's temporary folder)."
    )
    cli.run(main)
