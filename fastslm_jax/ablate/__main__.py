"""Experiments on what the paper leaves open: trains and scores variants, with several seeds.

    python -m fastslm_jax.ablate --suite=adapters [--workdir=runs/ablate] [--seeds=3]

Suites: adapters, tokens (per 30 s), recovery (layers of detail recovery), scales and hfq (details
of the HFQ-Former) train stage 1; grouping and stages train stages 1 and 2 and score recordings of
up to 10 minutes in one context. Without training, robustness scores the demo's model in assets/ on
speech of rising difficulty, and probes tells what its speech tokens keep beyond words.

A run is one training by train.py and its scores by eval.py, in WORKDIR/runs; its output is in the
logs there. Suites share the runs that they have in common. WORKDIR/SUITE gets results.jsonl (a line
for each run), results.md (mean and standard deviation) and results.png, after every run. Interrupt
at any time; rerunning resumes. More --seeds can be added.

By default the demo's corpus and models are used; the corpus is made in runs/demo if it is missing.
At full size, name configs and your data: --config is stage 1, --stage2 is stage 2 (for grouping and
stages), and fields can be changed as for train.py:

    python -m fastslm_jax.ablate --suite=grouping --workdir=runs/full \\
        --config=configs/stage1_shortform.py --config.data.train.asr.path=DIR/train.jsonl \\
        --config.eval.sets.recordings=DIR/long.jsonl --stage2=configs/stage2_longform.py \\
        --stage2.data.train.long.path=DIR/train.jsonl

The test sets of --config are scored; `recordings` in one context, and by length.
docs/experiments.md shows how to read the results.
"""

import pathlib
import time
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from fastslm_jax import cli
from fastslm_jax.ablate.suites import SUITES

FLAGS = flags.FLAGS
EVALUATIONS = ("robustness", "probes")  # of the model in assets/
STAGES = {"stage1": "config", "stage2": "stage2"}  # stage: flag


def define_flags() -> None:
    flags.DEFINE_enum("suite", None, [*SUITES, *EVALUATIONS], "The experiment.")
    flags.DEFINE_string("workdir", "runs/ablate", "Folder of the runs and results.")
    flags.DEFINE_integer("seeds", 3, "Number of seeds: 0, 1, …", lower_bound=1)
    for stage, flag in STAGES.items():
        config_flags.DEFINE_config_file(
            flag,
            f"configs/ablation.py:{stage[-1]}",
            f"The config of {stage}; its fields can be changed: --{flag}.steps=100.",
            lock_config=True,
        )


REQUIRED = ("suite",)
if __name__ == "__main__":
    define_flags()
    cli.parse_flags(REQUIRED)  # before the imports below, which take seconds

import jax

from fastslm_jax import config as config_lib
from fastslm_jax import devices, outputs
from fastslm_jax.ablate import probing, recordings, report, robustness, runs
from fastslm_jax.ablate.suites import Stage
from fastslm_jax.demo.phases import Phases
from fastslm_jax.errors import UserError
from fastslm_jax.training import checkpoint, experiment


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: every setting is a flag, --name=value")
    jax.config.update("jax_platforms", "cpu")  # other devices are for the trainings' processes
    workdir = outputs.check_folder(FLAGS.workdir, "--workdir")
    with checkpoint.lock(workdir, work="running experiments"):
        if FLAGS.suite in EVALUATIONS:
            suite = {"robustness": robustness, "probes": probing}[FLAGS.suite]
            question, planned = suite.QUESTION, suite.plan(FLAGS.seeds)
        else:
            suite = SUITES[FLAGS.suite]
            stage2 = read_stage("stage2", None) if suite.has_lengths else None
            stage1 = read_stage("stage1", stage2)
            question = suite.question
            planned = runs.plan(FLAGS.suite, suite, stage1, stage2, FLAGS.seeds)
            if stage1.config.name.startswith("ablation-"):
                make_data(workdir, stage1, suite.has_lengths)
            check_data(stage1, stage2, suite.has_lengths)
        run_all(workdir, FLAGS.suite, question, planned)


def read_stage(name: str, following: Stage | None) -> Stage:
    """The stage of a config flag.

    Raises:
        UserError: a field of its config, or a pretrained folder, cannot be used.
    """
    flag = FLAGS[STAGES[name]]
    config_lib.check(flag.value, f"--{flag.name}")
    changed = config_flags.get_override_values(flag).items()
    command = [f"--config.{field}={value}" for field, value in changed]
    command.insert(0, f"--config={config_flags.get_config_filename(flag)}")
    model = experiment.build(flag.value, weights=False).model
    return Stage(name, tuple(command), flag.value, model, following)


def make_data(workdir: pathlib.Path, stage1: Stage, has_lengths: bool) -> None:
    """Makes the corpus and the recordings that configs/ablation.py names, if they are missing."""
    corpus = pathlib.Path(stage1.config.data.train.asr.path)
    if not corpus.exists():
        command = ["-m", "fastslm_jax.demo.corpus", f"--out={corpus.parent}"]
        Phases(workdir).run("corpus", [*command, f"--workers={devices.cores()}"])
    if has_lengths:
        recordings.build(pathlib.Path(stage1.config.eval.sets.recordings).parent)


def check_data(stage1: Stage, stage2: Stage | None, has_lengths: bool) -> None:
    """Raises UserError if a manifest that the runs read is missing, before the first training."""
    for stage in filter(None, (stage1, stage2)):
        sources = stage.config.data.train.items()
        paths = {f"data.train.{name}.path": source.path for name, source in sources}
        if stage is stage1:
            sets = stage.config.eval.sets.items()
            read = [(name, path) for name, path in sets if has_lengths or name != runs.LONG]
            paths |= {f"eval.sets.{name}": path for name, path in read}
        for field, path in paths.items():
            if not pathlib.Path(path).expanduser().exists():
                raise UserError(f"{stage.flags[0]}: {field}={path}: no such file")


def run_all(
    workdir: pathlib.Path,
    name: str,
    question: str,
    planned: Sequence[runs.Run | robustness.Run | probing.Run],
) -> None:
    """Runs what is missing, one line a run, and writes the results after each.

    Raises:
        UserError: some runs failed; the others are finished.
    """
    folder, out = workdir / "runs", workdir / name
    out.mkdir(exist_ok=True)
    open_ = [run for run in planned if not run.is_done(folder)]
    finished = [run for run in planned if run not in open_]
    print(f"{name}: {len(planned)} runs, {len(finished)} finished", flush=True)
    failed, started = [], time.time()
    for number, run in enumerate(open_, 1):
        begun = time.time()
        try:
            run.execute(folder)
        except UserError as error:
            failed.append(run)
            cli.report(error, f"{run.name}: ")
            continue
        finished = [each for each in planned if each in finished or each is run]
        records = {each: each.records(folder) for each in finished}
        report.write(out, question, [record for each in finished for record in records[each]])
        spent, left = time.time() - begun, (time.time() - started) / number * (len(open_) - number)
        print(
            f"[{len(finished)}/{len(planned)}] {run.name}: {report.headline(records[run][0])}, "
            f"{spent / 60:.1f} min; about {left / 60:.0f} min left",
            flush=True,
        )
    if failed:
        raise UserError(f"{len(failed)} of {len(planned)} runs failed; the same command retries")
    if not open_ and report.is_written(out):
        print(f"nothing to do: all runs are finished; {out / report.TABLE}")
        return
    if not open_:
        report.write(out, question, [record for run in planned for record in run.records(folder)])
    print((out / report.TABLE).read_text(encoding="utf-8"))
    print(f"results: {out}/{report.RESULTS}, {report.TABLE} and {report.PICTURE}")


if __name__ == "__main__":
    cli.run(main, REQUIRED)
