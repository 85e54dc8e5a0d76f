"""Evaluates a checkpoint on the config's test sets.

    python eval.py --config=configs/demo.py:3 --workdir=runs/demo/stage3 [--checkpoint=STEP] [--sets=test,test_long]
        [--tasks=asr] [--swap_audio]

Writes WORKDIR/eval/SET/TASK/{predictions.jsonl, metrics.json} and a table. With --swap_audio every prompt hears the audio of
another utterance: the control that a model which listens must fail.
"""

import json
import pathlib
import time

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from fastslm_jax import cli, evaluation, experiment, optim, sharding
from fastslm_jax.checkpoint import CheckpointError, Checkpoints
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.decode import Generator
from fastslm_jax.errors import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment, for example configs/demo.py:3.", lock_config=True)
flags.DEFINE_string("workdir", None, "Working directory of the run.")
flags.DEFINE_integer("checkpoint", None, "Step to evaluate (default: the newest).")
flags.DEFINE_list("sets", [], "Names of config.eval.sets (default: all).")
flags.DEFINE_list("tasks", [], "Tasks to evaluate (default: all).")
flags.DEFINE_integer("limit", 0, "Utterances of each set and task (0: all).")
flags.DEFINE_bool("swap_audio", False, "Let every prompt hear another utterance's audio.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
    unknown = set(FLAGS.sets) - set(config.eval.sets)
    if unknown:
        raise UserError(f"--sets={','.join(sorted(unknown))}: not in config.eval.sets ({', '.join(config.eval.sets)})")
    sets = {name: read_manifest(config.eval.sets[name], FLAGS.tasks) for name in FLAGS.sets or config.eval.sets}
    generator = load_generator(config, workdir, FLAGS.checkpoint)

    table = []
    folder = workdir / ("eval_swapped_audio" if FLAGS.swap_audio else "eval")
    for name, all_utterances in sets.items():
        groups = evaluation.by_task(all_utterances)
        for (task, lang), utterances in sorted(groups.items()):
            label = task if sum(task == other for other, _ in groups) == 1 else f"{task}-{lang}"
            utterances = utterances[: FLAGS.limit or None]
            started = time.time()
            clip_for = evaluation.swapped(utterances, config.seed) if FLAGS.swap_audio else None
            seconds = sum(utterance.seconds for utterance in utterances)
            with tqdm(total=round(seconds), unit="s", desc=f"{name} {label}", mininterval=2) as bar:
                predictions = evaluation.predict(
                    generator,
                    utterances,
                    batch_size=config.eval.batch_size,
                    progress=lambda s, b=bar: b.update(round(s)),
                    clip_for=clip_for,
                )
            scores = evaluation.summarize(predictions) | {"run_seconds": round(time.time() - started, 2)}
            scores["device"] = jax.devices()[0].device_kind
            write(folder / name / label, predictions, scores)
            table.append((name, label, scores))
    for name, task, scores in table:
        shown = {key: value for key, value in scores.items() if key in ("wer", "cer", "chrf", "bleu", "rougeL", "em")}
        print(f"{name:>20} {task:>5} " + "  ".join(f"{key} {value:7.3f}" for key, value in shown.items()))


def load_generator(config, workdir: pathlib.Path, step: int | None) -> Generator:
    """The model of a checkpoint (the newest by default)."""
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(f"{workdir}: has checkpoints of steps {steps or 'none'}" + (f", not {step}" if steps else ""))
    setup = experiment.build(config)
    params = experiment.restore_params(
        setup, config, checkpoints, steps[-1] if step is None else step, sharding.make_mesh(**config.mesh)
    )
    return Generator(setup.model, optim.merge(params, {}), setup.prompt_encoder())


def write(folder: pathlib.Path, predictions: list[dict], scores: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    (folder / "predictions.jsonl").write_text(lines)
    (folder / "metrics.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
