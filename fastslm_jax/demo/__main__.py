"""The whole demo in one command (`make demo`).

It transcribes three recordings with the model in assets/, then builds a corpus, trains a model like
it in three stages, evaluates it, and writes a report.

    python -m fastslm_jax.demo [--out=runs/demo] [--seed=0]

Interrupt at any time; rerunning resumes. Each phase is a resumable command.
"""

import ctypes
import json
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from fastslm_jax import cli, devices, outputs
from fastslm_jax.demo import report
from fastslm_jax.errors import UserError

STAGES = ("stage1", "stage2", "stage3")
RECORDINGS = [f"assets/recordings/sentence{number}.flac" for number in (1, 2, 3)]
MODEL = "assets/demo_model"
FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("out", "runs/demo", "Output folder.")
    flags.DEFINE_integer("seed", 0, "Seed of the corpus and of training.")
    flags.DEFINE_list(
        "train_flags",
        [],
        "More flags for train.py, for example --config.steps=8 for a quick trial.",
    )
    flags.DEFINE_list("corpus_flags", [], "More flags for the corpus, for example --utterances=60.")


class Phases:
    """Runs commands one after another, skipping those that are done.

    OUT/phases.json records which are done, and their time and peak memory over all attempts.
    """

    def __init__(self, out: pathlib.Path) -> None:
        self.out, self.file = out, out / "phases.json"
        self.state: dict[str, dict] = {}
        if self.file.exists():
            self.state = json.loads(self.file.read_text(encoding="utf-8"))

    def run(self, name: str, command: list[str]) -> None:
        """Runs `python COMMAND` as the phase `name`.

        Raises:
            UserError: the command failed, or the phase was previously run with a different command.
        """
        phase = self.state.setdefault(
            name, {"done": False, "seconds": 0.0, "peak_rss_gib": 0.0, "command": command}
        )
        if phase["command"] != command:
            before = " ".join(phase["command"])
            raise UserError(
                f"{self.out} was created with other flags ({before}); "
                "choose another --out or delete it"
            )
        if phase["done"]:
            print(f"[{name}] already done", flush=True)
            return
        print(f"[{name}] python {' '.join(command)}", flush=True)
        before, started = phase["seconds"], time.time()
        process = subprocess.Popen([sys.executable, *command], preexec_fn=_die_with_parent)
        while True:
            try:
                code = process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                code = None
            except KeyboardInterrupt:  # the phase received it too, and saves its state
                process.wait()
                raise
            phase["seconds"] = before + time.time() - started
            if code is not None:
                break
            self._write()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        phase["peak_rss_gib"] = round(max(phase["peak_rss_gib"], peak), 2)
        phase["done"] = code == 0
        self._write()
        if code:
            raise UserError(
                f"{name} failed with exit code {code}; "
                "fix the error above and run the same command again"
            )

    def _write(self) -> None:
        outputs.write_text(self.file, json.dumps(self.state, indent=1))


def _die_with_parent() -> None:
    """Ends the phase if the demo is killed (Linux only; elsewhere train.py's lock protects it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(_: Sequence[str]) -> None:
    out = outputs.check_folder(FLAGS.out, "--out")
    phases, seed = Phases(out), FLAGS.seed
    transcribe = ["-m", "fastslm_jax.transcribe"]
    phases.run("transcribe", [*transcribe, *RECORDINGS, f"--checkpoint={MODEL}"])
    corpus = [
        "-m",
        "fastslm_jax.demo.corpus",
        f"--out={out}/corpus",
        f"--seed={seed}",
        f"--workers={devices.cores()}",
    ]
    phases.run("corpus", corpus + FLAGS.corpus_flags)
    for number, stage in enumerate(STAGES, start=1):
        config = [
            f"--config=configs/demo.py:{number},{out}",
            f"--workdir={out}/{stage}",
            f"--config.seed={seed}",
        ]
        phases.run(stage, ["train.py", *config, *FLAGS.train_flags])
    config = [f"--config=configs/demo.py:3,{out}", f"--workdir={out}/stage3"]
    phases.run("eval", ["eval.py", *config, "--swap_audio=test"])
    summary = report.write(out, phases.state)
    print(report.table(summary))
    print(f"\nreport: {out}/report.json and {out}/report.png; curves: tensorboard --logdir {out}")
    command = " ".join([sys.executable, *transcribe, "FILE", f"--checkpoint={out}/stage3"])
    print(f"to transcribe a file: {command}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
