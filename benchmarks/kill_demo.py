"""Kills the demo with SIGKILL in every phase and compares its report with an undisturbed one.

    python benchmarks/kill_demo.py [--full]          # a small demo of a few steps (about 9 minutes), or the real one twice

Last line: one JSON object; `equal` must be true, and `kills` the number of phases.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

SMALL = [
    "--train_flags=--config.steps=8,--config.checkpoint_every=2,--config.log_every=1,--config.eval_every=4,--config.data.dev_utterances=4",
    "--corpus_flags=--utterances=120,--train_ast=20,--train_ssum=20,--train_sqqa=20,--dev=4,--test_asr=4,--test_ast=4,--test_ssum=4,"
    "--test_sqqa=4,--test_unseen_voices=4,--test_long=1",
]
PHASES = ("corpus", "stage1", "stage2", "stage3", "eval")
FREE = ("minutes", "peak_rss_gib")  # what may differ between two runs


def start(out: pathlib.Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastslm_jax.demo", f"--out={out}", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def report(out: pathlib.Path) -> dict:
    summary = json.loads((out / "report.json").read_text())
    stages = [
        {key: value for key, value in stage.items() if key not in FREE}
        for stage in summary.pop("stages")
    ]
    return {key: value for key, value in summary.items() if key not in FREE} | {"stages": stages}


def is_in(out: pathlib.Path, phase: str) -> bool:
    """Has the phase begun? For a training stage: has it a checkpoint to go on from?"""
    if phase.startswith("stage"):
        return any((out / phase / "checkpoints").glob("[0-9]*"))
    file = out / "phases.json"
    return file.exists() and phase in json.loads(file.read_text())


def main():
    flags, rng = [] if "--full" in sys.argv else SMALL, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = pathlib.Path(folder, "undisturbed"), pathlib.Path(folder, "killed")
        if start(undisturbed, flags).wait():
            sys.exit("the undisturbed demo failed")
        kills = 0
        for phase in PHASES:
            process = start(killed, flags)
            while process.poll() is None and not is_in(killed, phase):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 2))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                print(f"killed in {phase}", flush=True)
            if process.wait() > 0:
                sys.exit(f"the demo failed before it was killed in {phase}")
        if start(killed, flags).wait():
            sys.exit("the demo failed after it was killed")
        before, after = report(undisturbed), report(killed)
    print(
        json.dumps(
            {"kills": kills, "equal": before == after, "undisturbed": before, "killed": after}
        )
    )
    sys.exit(before != after or kills < len(PHASES))


if __name__ == "__main__":
    main()
