"""The whole demo in one command (`make demo`).

It transcribes three recordings with the model in assets/, then builds a corpus, trains a model like
it in three stages, evaluates it, and writes a report.

    python -m fastslm_jax.demo [--out=runs/demo] [--seed=0]

Interrupt at any time; rerunning resumes. Each phase is a resumable command.
"""

import sys
from collections.abc import Sequence

from absl import flags

from fastslm_jax import cli, devices, outputs
from fastslm_jax.demo import report
from fastslm_jax.demo.phases import Phases

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
