"""Evaluates a checkpoint on the test sets of its config.

    python eval.py --config=configs/demo.py:3 --workdir=runs/demo/stage3 [--checkpoint=STEP|best]
        [--sets=test,test_long] [--tasks=asr] [--span=auto|none|SECONDS] [--swap_audio=test]
        [--judge=URL --judge_model=NAME] [--rtfx_batches=1,4,16]
    python eval.py --score_only --workdir=runs/demo/stage3 [--predictions=FILE]
        [--eval_results=librispeech_clean_wer=librispeech_clean,…]
    python eval.py --compare A.jsonl B.jsonl [--compare_by=recording|speaker|utterance]

Writes WORKDIR/eval/SET/TASK/{predictions.jsonl, metrics.json} and WORKDIR/eval/eval.png, and prints
a table. A stopped run resumes when it is started again. --swap_audio names sets that are also
transcribed with the audio of other utterances (into SET/asr-swapped): a control on which a model
that uses the audio must score poorly. --score_only scores existing predictions, or those of a
file, without a model. Predictions of another manifest, or of more utterances, are only replaced
with --overwrite. --compare tests whether the second of two files of predictions of one set is
better than the first. docs/eval.md describes the scoring conventions.
"""

import sys

from absl import flags
from ml_collections import config_flags

from fastslm_jax import cli

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "The experiment, for example configs/demo.py:3.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Working directory of the run.")
cli.define_step("checkpoint", "Checkpoint to evaluate")
flags.DEFINE_bool("other_bases", False, cli.OTHER_BASES)
flags.DEFINE_list("sets", [], "Names of config.eval.sets (default: all).")
flags.DEFINE_list("tasks", [], "Tasks to evaluate (default: all).")
flags.DEFINE_integer("limit", 0, "Maximum utterances of each set and task (0: all).", 0)
flags.DEFINE_bool(
    "overwrite", False, "Replace predictions of another manifest, or of more utterances."
)
flags.DEFINE_string(
    "span",
    "auto",
    "Length of the segments that long recordings are cut into: seconds, none (one context), or "
    "auto (see docs/longform.md).",
)
flags.DEFINE_bool(
    "redo_loops", True, "Decode segments that end in a repetition loop again, in two halves."
)
flags.DEFINE_enum(
    "kv_cache",
    None,
    ["float32", "bfloat16", "int8"],
    "Type of the key-value cache (default: the model's).",
)
flags.DEFINE_list("swap_audio", [], "Sets that are also transcribed with swapped audio.")
flags.DEFINE_bool("score_only", False, "Score existing predictions.")
flags.DEFINE_string("predictions", None, "With --score_only: the file of predictions to score.")
flags.DEFINE_string(
    "judge",
    None,
    "An OpenAI-compatible endpoint that rates summaries and answers, such as http://host:8000/v1.",
)
flags.DEFINE_string("judge_model", None, "Name of the judge's model at that endpoint.")
flags.DEFINE_list(
    "rtfx_batches", [], "Batch sizes to measure the speed of, on the first utterances of each set."
)
flags.DEFINE_bool(
    "yarn",
    True,
    "Scale positions beyond the language model's native context (YaRN); matters with --span=none.",
)
flags.DEFINE_list(
    "chunks",
    [],
    "Sets whose lines are chunks of recordings, in order, each with the recording's whole "
    "transcript: answers are joined before they are scored.",
)
flags.DEFINE_list(
    "eval_results",
    [],
    "Also write WORKDIR/eval/.eval_results/open_asr_leaderboard.yaml for the Hugging Face hub: "
    "TASK_ID=SET, or TASK_ID=SET+SET for their mean; the task id rtfx is the speed.",
)
flags.DEFINE_string(
    "bertscore", None, "Model (hub id or folder) for BERTScore of translations and summaries."
)
flags.DEFINE_integer("bertscore_layer", None, "Its layer, if the package does not know it.", 1)
flags.DEFINE_string(
    "compare", None, "A file of predictions; the file that follows is compared with it."
)
flags.DEFINE_enum(
    "compare_by",
    None,
    ["recording", "speaker", "utterance"],
    "What --compare resamples (default: recordings, or utterances if a file does not name them).",
)
IS_COMPARISON = any(argument.lstrip("-").split("=")[0] == "compare" for argument in sys.argv)
REQUIRED = () if IS_COMPARISON else ("workdir",)
if __name__ == "__main__":
    cli.parse_flags(REQUIRED)  # before the imports below, which take seconds

import dataclasses
import pathlib
import re
import time
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax import devices, outputs
from fastslm_jax.data.manifest import Utterance, fingerprint, read_manifest
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import compare, leaderboard, plots, predict, results
from fastslm_jax.evaluation.bertscore import BertScore
from fastslm_jax.evaluation.judge import Judge
from fastslm_jax.inference import load, long_form
from fastslm_jax.inference.generator import Generator
from fastslm_jax.inference.long_form import Recording
from fastslm_jax.training.checkpoint import Checkpoints

RTFX_UTTERANCES = 32


def main(argv: Sequence[str]) -> None:
    if FLAGS.compare is not None:
        compare_files(argv[1:])
        return
    workdir = pathlib.Path(FLAGS.workdir)
    folder = workdir / "eval"
    if (FLAGS.judge is None) != (FLAGS.judge_model is None):
        raise UserError("--judge and --judge_model: give both")
    if FLAGS.predictions and not FLAGS.score_only:
        raise UserError(f"--predictions={FLAGS.predictions}: works only with --score_only")
    tasks = leaderboard.parse_results(FLAGS.eval_results)
    raters = (
        Judge(FLAGS.judge, FLAGS.judge_model) if FLAGS.judge else None,
        BertScore(FLAGS.bertscore, FLAGS.bertscore_layer) if FLAGS.bertscore else None,
    )
    if FLAGS.score_only and FLAGS.predictions:
        rows = results.score_file(folder, pathlib.Path(FLAGS.predictions), *raters)
    elif FLAGS.score_only:
        rows = results.score_again(folder, *raters)
    else:
        rows = answer_and_score(FLAGS.config, workdir, folder, *raters)
    if tasks:
        sets = {name: s for name, label, s in rows if label in ("asr", "asr-en")}
        text = leaderboard.eval_results(tasks, sets)
        written = outputs.check_folder(folder / ".eval_results", "--workdir")
        outputs.write_text(written / "open_asr_leaderboard.yaml", text)
    plots.picture(folder / "eval.png", rows)
    print(plots.table(rows))
    failed = [f"{name} {label} {key}" for name, label, s in rows for key in s.get("failed", {})]
    if failed:
        raise UserError(
            f"{folder}: not computed: {', '.join(failed)} (see metrics.json); all predictions and "
            "other scores are written, and --score_only tries again"
        )


def compare_files(others: Sequence[str]) -> None:
    if len(others) != 1:
        raise UserError("--compare: needs two files: eval.py --compare A.jsonl B.jsonl")
    first, second = pathlib.Path(FLAGS.compare), pathlib.Path(others[0])
    found = compare.files(first, second, FLAGS.compare_by)
    print(f"A: {first}\nB: {second}")
    print("\n".join(map(str, found)))


def answer_and_score(
    config: ConfigDict,
    workdir: pathlib.Path,
    folder: pathlib.Path,
    judge: Judge | None,
    bertscore: BertScore | None,
) -> plots.Rows:
    # ------------------------------------------------------------------------------------- sets
    long_form.parse_span(FLAGS.span)
    batch_sizes = [parse_batch_size(size) for size in FLAGS.rtfx_batches]
    sets = read_sets(config, folder)
    checkpoints = Checkpoints(workdir, read_only=True)
    step = load.find_step(checkpoints, workdir, FLAGS.checkpoint)
    run = {
        "checkpoint": step,
        "saved": (checkpoints.folder / str(step)).stat().st_mtime_ns,
        "span": FLAGS.span,
        "kv_cache": FLAGS.kv_cache,
        "bases": [config.base.whisper, config.base.llm],
        **({} if FLAGS.yarn else {"yarn": False}),
    }
    if not FLAGS.redo_loops:
        run["redo_loops"] = False
    todo = []
    for name, label, utterances, clips in parts(sets, config.seed):
        manifest = config.eval.sets[name]
        settings = run | {"manifest": str(manifest), "manifest_sha256": fingerprint(manifest)}
        chunks: list[dict] = [{}] * len(utterances)
        if name in FLAGS.chunks and utterances[0].task == "asr":
            chunks, settings["chunks"] = predict.chunk_fields(utterances), True
        ids = {utterance.id for utterance in utterances}
        log = results.PredictionLog(folder / name / label, settings, ids, FLAGS.overwrite)
        todo.append((log, name, label, utterances, clips, chunks))

    # ------------------------------------------------------------------------------------ model
    generator = load.load(config, checkpoints, step, FLAGS.other_bases, cache_dtype=FLAGS.kv_cache)
    if not FLAGS.yarn:
        generator.capacity = dataclasses.replace(generator.capacity, native_positions=None)
    trained = long_form.trained_seconds(config.data.train, generator.model.window.seconds)

    def as_recordings(utterances: Sequence[Utterance], clips: Sequence[Utterance]) -> list:
        return [
            dataclasses.replace(
                long_form.with_segments(
                    generator.capacity, predict.recording(utterance, clip), trained, FLAGS.span
                ),
                redo_loops=FLAGS.redo_loops,
            )
            for utterance, clip in zip(utterances, clips, strict=True)
        ]

    # ------------------------------------------------------------------------ predict and score
    rows = []
    for log, name, label, utterances, clips, chunks in todo:
        started = time.time()
        recordings = as_recordings(utterances, clips)
        seconds = sum(u.seconds for u in utterances)
        found = {i: log.known[u.id] for i, u in enumerate(utterances) if u.id in log.known}
        done = sum(utterances[i].seconds for i in found)
        with cli.AudioBar(seconds, f"{name} {label}", done) as bar:
            for i, progress, prediction in predict.predict(
                generator,
                utterances,
                batch_size=config.eval.batch_size,
                recordings=recordings,
                known=tuple(found),
            ):
                bar.update(progress)
                if prediction is not None:
                    found[i] = prediction | chunks[i]
                    log.add(found[i])
        measured = {
            "run_seconds": round(time.time() - started, 2),
            "device": devices.name(),
            "peak_memory_gib": devices.peak_memory_gib(),
            "checkpoint": step,
            "run": log.run,
        }
        if batch_sizes:
            own = as_recordings(utterances, utterances)
            measured["rtfx_by_batch"] = rtfx_by_batch(generator, utterances, own, batch_sizes)
        predictions = [found[i] for i in range(len(utterances))]
        rows.append((name, label, log.finish(predictions, measured, judge, bertscore)))
    return rows


def read_sets(config: ConfigDict, folder: pathlib.Path) -> dict[str, list[Utterance]]:
    """{name: utterances} of the requested sets and tasks; `folder` will have one of each name."""
    if config is None:
        raise UserError("--config: is required (except with --score_only)")
    config_lib.check(config)
    available = ", ".join(config.eval.sets)
    if unknown := set(FLAGS.sets) - set(config.eval.sets):
        raise UserError(
            f"--sets={','.join(sorted(unknown))}: not in config.eval.sets ({available})"
        )
    if unknown := set(FLAGS.tasks) - set(TASKS):
        raise UserError(f"--tasks={','.join(sorted(unknown))}: not among {', '.join(TASKS)}")
    names = FLAGS.sets or list(config.eval.sets)
    for name in names:
        results.set_folder(folder, name)
    sets = {name: read_manifest(config.eval.sets[name]) for name in names}
    if not sets:
        raise UserError(
            "config.eval.sets is empty: add a set, for example "
            "--config.eval.sets.test=DIR/test.jsonl"
        )
    if FLAGS.tasks:
        tasks = set(FLAGS.tasks)
        sets = {name: [u for u in members if u.task in tasks] for name, members in sets.items()}
        sets = {name: members for name, members in sets.items() if members}
        if not sets:
            raise UserError(f"--tasks={','.join(FLAGS.tasks)}: no set contains these tasks")
    for task, needed in leaderboard.parse_results(FLAGS.eval_results).items():
        if missing := set(needed) - set(sets):
            raise UserError(f"--eval_results={task}: {sorted(missing)[0]!r} is not evaluated")
    if FLAGS.limit and set(FLAGS.chunks) & set(sets):
        raise UserError("--limit: would leave out chunks of recordings; omit it with --chunks")
    for flag in ("chunks", "swap_audio"):
        check_transcribed(flag, sets)
    return sets


def check_transcribed(flag: str, sets: dict[str, list[Utterance]]) -> None:
    for name in FLAGS[flag].value:
        if not any(utterance.task == "asr" for utterance in sets.get(name, ())):
            raise UserError(
                f"--{flag}={name}: not an evaluated set with transcriptions ({', '.join(sets)})"
            )


def parts(
    sets: dict[str, list[Utterance]], seed: int
) -> Iterator[tuple[str, str, list[Utterance], list[Utterance]]]:
    """Yields (set, label, utterances, the utterances whose audio they get)."""
    for name, members in sets.items():
        for label, utterances in predict.by_task(members).items():
            utterances = utterances[: FLAGS.limit or None]
            yield name, label, utterances, utterances
            if name in FLAGS.swap_audio and utterances[0].task == "asr":
                yield name, f"{label}-swapped", utterances, predict.swapped(utterances, seed)


def parse_batch_size(size: str) -> int:
    """A value of --rtfx_batches."""
    if not re.fullmatch("[1-9][0-9]{0,5}", size):
        raise UserError(f"--rtfx_batches={size}: use whole numbers above 0")
    return int(size)


def rtfx_by_batch(
    generator: Generator,
    utterances: Sequence[Utterance],
    recordings: Sequence[Recording],
    sizes: Sequence[int],
) -> dict[str, float]:
    """Audio seconds per second of run time by batch size, on the first utterances.

    Each size runs twice; the second run is measured.
    """
    speeds = {}
    for size in sizes:
        for _ in range(2):
            found = predict.predictions(
                generator,
                utterances[:RTFX_UTTERANCES],
                recordings=recordings[:RTFX_UTTERANCES],
                batch_size=size,
            )
        spent = sum(p["batch_seconds"] for p in found)
        speeds[str(size)] = round(sum(p["seconds"] for p in found) / spent, 2)
    return speeds


if __name__ == "__main__":
    cli.run(main, REQUIRED)
