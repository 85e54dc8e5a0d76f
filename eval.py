"""Evaluates a checkpoint on the config's test sets.

    python eval.py --config=configs/demo.py:3 --workdir=runs/demo/stage3 [--checkpoint=STEP] [--sets=test,test_long]
        [--tasks=asr] [--span=auto|none|SECONDS] [--swap_audio=test] [--judge=URL --judge_model=NAME] [--rtfx_batches=1,4,16]
    python eval.py --score_only --workdir=runs/demo/stage3 [--predictions=FILE]

Writes WORKDIR/eval/SET/TASK/{predictions.jsonl, metrics.json}, WORKDIR/eval/eval.png and a table; docs/eval.md has the
conventions. Run again, it goes on where it was stopped. --swap_audio names sets that are transcribed once more, each prompt with
the audio of another utterance (into WORKDIR/eval/SET/asr-swapped): the control that a model which listens must fail.
--score_only scores predictions that are there (or those of a file, into WORKDIR/eval/FILE'S NAME), and needs no model.
"""

import pathlib
import time

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from fastslm_jax import cli, devices
from fastslm_jax.data.manifest import Utterance, read_manifest
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict as evaluation
from fastslm_jax.evaluation import results
from fastslm_jax.evaluation.judge import Judge
from fastslm_jax.inference import load, long_form
from fastslm_jax.training.checkpoint import Checkpoints

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "The experiment, for example configs/demo.py:3.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Working directory of the run.")
flags.DEFINE_integer("checkpoint", None, "Step to evaluate (default: the newest).")
flags.DEFINE_list("sets", [], "Names of config.eval.sets (default: all).")
flags.DEFINE_list("tasks", [], "Tasks to evaluate (default: all).")
flags.DEFINE_integer("limit", 0, "Utterances of each set and task (0: all).")
flags.DEFINE_string(
    "span",
    "auto",
    "Seconds of a span of long recordings, none (one context), or auto (see docs/longform.md).",
)
flags.DEFINE_enum(
    "kv_cache",
    None,
    ["float32", "bfloat16", "int8"],
    "Type of the key-value cache (default: the model's).",
)
flags.DEFINE_list(
    "swap_audio",
    [],
    "Sets that are transcribed once more, each prompt with another utterance's audio.",
)
flags.DEFINE_bool("score_only", False, "Score predictions that are there.")
flags.DEFINE_string("predictions", None, "With --score_only: this file's predictions.")
flags.DEFINE_string(
    "judge",
    None,
    "An OpenAI-compatible endpoint that rates summaries and answers, such as http://host:8000/v1.",
)
flags.DEFINE_string("judge_model", None, "The judge's name at that endpoint.")
flags.DEFINE_list(
    "rtfx_batches", [], "Batch sizes to measure the speed of, on each set's first utterances."
)


def main(_):
    workdir = pathlib.Path(FLAGS.workdir)
    if (FLAGS.judge is None) != (FLAGS.judge_model is None):
        raise UserError("--judge and --judge_model: give both")
    judge = Judge(FLAGS.judge, FLAGS.judge_model) if FLAGS.judge else None
    folder = workdir / "eval"
    if FLAGS.score_only:
        table = results.score_again(folder, FLAGS.predictions, judge)
    else:
        table = answer_and_score(FLAGS.config, workdir, folder, judge)
    results.picture(folder, table)
    print(results.table(table))


def answer_and_score(
    config, workdir: pathlib.Path, folder: pathlib.Path, judge: Judge | None
) -> list[tuple[str, str, dict]]:
    """(set, label, scores) of every set and task."""
    if config is None:
        raise UserError(
            "--config: is needed (without it, --score_only scores predictions that are there)"
        )
    if unknown := set(FLAGS.sets) - set(config.eval.sets):
        raise UserError(
            f"--sets={','.join(sorted(unknown))}: not in config.eval.sets ({', '.join(config.eval.sets)})"
        )
    sets = {name: read_manifest(config.eval.sets[name]) for name in FLAGS.sets or config.eval.sets}
    if FLAGS.tasks:
        sets = {
            name: [utterance for utterance in members if utterance.task in FLAGS.tasks]
            for name, members in sets.items()
        }
        sets = {name: members for name, members in sets.items() if members}
        if not sets:
            raise UserError(f"--tasks={','.join(FLAGS.tasks)}: no set has an utterance of these")
    if not sets:
        raise UserError(
            "config.eval.sets is empty: name a set, for example --config.eval.sets.test=DIR/test.jsonl"
        )
    for name in FLAGS.swap_audio:
        if not any(utterance.task == "asr" for utterance in sets.get(name, ())):
            raise UserError(
                f"--swap_audio={name}: no set of that name with transcriptions is evaluated here ({', '.join(sets)})"
            )
    checkpoints = Checkpoints(workdir, read_only=True)
    step = load.find_step(checkpoints, workdir, FLAGS.checkpoint)
    generator = load.load(config, checkpoints, step, cache_dtype=FLAGS.kv_cache)
    trained = long_form.trained_seconds(config, generator.model.window.seconds)
    run = {"checkpoint": step, "saved": (checkpoints.folder / str(step)).stat().st_mtime_ns}
    run |= {
        "span": FLAGS.span,
        "kv_cache": FLAGS.kv_cache,
        "bases": [config.base.whisper, config.base.llm],
    }

    def span_of(u):
        return long_form.span_for(generator, u.seconds, u.task, u.instruction, trained, FLAGS.span)

    table = []
    for name, label, utterances, clip_for in parts(sets, config.seed):
        started = time.time()
        settings = run | {"manifest": str(config.eval.sets[name])}
        kept = results.Kept(folder / name / label, settings)
        seconds = sum(utterance.seconds for utterance in utterances)
        with tqdm(total=round(seconds), unit="s", desc=f"{name} {label}", mininterval=2) as bar:
            predictions = evaluation.predict(
                generator,
                utterances,
                batch_size=config.eval.batch_size,
                progress=bar.update,
                clip_for=clip_for,
                span_of=span_of,
                known=kept.known,
                keep=kept.add,
            )
        measured = {"run_seconds": round(time.time() - started, 2), "device": devices.name()}
        measured |= {
            "peak_memory_gib": devices.peak_memory_gib(),
            "checkpoint": step,
            "run": settings,
        }
        if FLAGS.rtfx_batches:
            measured["rtfx_by_batch"] = results.rtfx_by_batch(
                generator, utterances, FLAGS.rtfx_batches, span_of
            )
        table.append((name, label, kept.finish(predictions, measured, judge)))
    return table


def parts(sets: dict[str, list[Utterance]], seed: int):
    """Yields (set, label, utterances, whose audio each hears) for every set and task, and for the sets of --swap_audio again."""
    for name, all_utterances in sets.items():
        groups = evaluation.by_task(all_utterances)
        for (task, lang), utterances in sorted(groups.items()):
            label = task if sum(task == other for other, _ in groups) == 1 else f"{task}-{lang}"
            utterances = utterances[: FLAGS.limit or None]
            yield name, label, utterances, None
            if name in FLAGS.swap_audio and task == "asr":
                yield name, f"{label}-swapped", utterances, evaluation.swapped(utterances, seed)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
