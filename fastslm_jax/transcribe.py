"""Answers audio files with a checkpoint.

    python -m fastslm_jax.transcribe FILE… --checkpoint=WORKDIR [--task=asr|ast|ssum|sqqa] [--prompt=…] [--format=text|json]

The config saved in the checkpoint says which bases it stands on.
"""

import json
import pathlib
import sys
import time

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from fastslm_jax import audio, cli, evaluation, experiment, optim, sharding
from fastslm_jax.checkpoint import CheckpointError, Checkpoints
from fastslm_jax.data.prompts import TASKS
from fastslm_jax.decode import Generator, Request
from fastslm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Working directory of a trained or imported model.", required=True)
    flags.DEFINE_enum("task", "asr", sorted(TASKS), "What to do with the audio.")
    flags.DEFINE_string("prompt", None, "An instruction of your own (default: the task's).")
    flags.DEFINE_enum("format", "text", ["text", "json"], "A line of text, or a JSON object, for each file.")
    flags.DEFINE_integer("max_new_tokens", None, "The most new tokens of an answer (default: grows with the recording).")


def load(checkpoint: str) -> Generator:
    """The model of a working directory's newest checkpoint, by the config saved in it."""
    checkpoints = Checkpoints(checkpoint, read_only=True)
    if not checkpoints.steps():
        raise CheckpointError(f"{checkpoint}: holds no finished checkpoint")
    step = checkpoints.steps()[-1]
    config = ConfigDict(checkpoints.meta(step)["config"])
    setup = experiment.build(config)
    params = experiment.restore_params(setup, config, checkpoints, step, sharding.make_mesh())
    return Generator(setup.model, optim.merge(params, {}), setup.prompt_encoder())


def main(argv):
    files = [pathlib.Path(name) for name in argv[1:]]
    if not files:
        raise UserError("no audio file named: python -m fastslm_jax.transcribe FILE… --checkpoint=WORKDIR")
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such audio file")
    generator = load(FLAGS.checkpoint)
    for file in tqdm(files, unit="file", disable=len(files) == 1 or not sys.stderr.isatty()):
        samples = audio.read_audio(file)
        seconds = len(samples) / audio.SAMPLE_RATE
        started = time.time()
        limit = FLAGS.max_new_tokens or evaluation.budget(seconds)
        (answer,) = generator.answer([Request(samples, FLAGS.task, FLAGS.prompt)], [limit])
        elapsed = time.time() - started
        if answer.stop_reason == "budget":
            print(f"{file}: the answer was cut after {limit} tokens; raise --max_new_tokens", file=sys.stderr)
        if FLAGS.format == "text":
            print(answer.text if len(files) == 1 else f"{file}\t{answer.text}", flush=True)
            continue
        record = {
            "file": str(file),
            "text": answer.text,
            "task": FLAGS.task,
            "seconds": round(seconds, 3),
            "windows": answer.windows,
            "speech_tokens": answer.speech_tokens,
            "covered_seconds": round(min(seconds, answer.windows * generator.model.window.seconds), 3),
            "stop_reason": answer.stop_reason,
            "new_tokens": len(answer.token_ids),
            "rtfx": round(seconds / elapsed, 2),
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
