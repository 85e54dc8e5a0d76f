"""Trains FastSLM.

    python train.py --config=configs/demo.py:1 --workdir=runs/demo/stage1 [--config.steps=100 ...]

Interrupt it at any time; the same command resumes. The workdir gets checkpoints/, metrics.jsonl,
TensorBoard events and config.json. On several hosts, run the same command on each (docs/scale.md).
"""

from absl import flags
from ml_collections import config_flags

from fastslm_jax import cli

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "The experiment, for example configs/demo.py:1.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if the cluster is not detected.")
flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
flags.DEFINE_integer(
    "process_id", None, "Index of this process, starting from 0, with --coordinator."
)
REQUIRED = ("config", "workdir")
if __name__ == "__main__":
    cli.parse_flags(REQUIRED)  # before the imports below, which take seconds

import collections
import contextlib
import functools
import hashlib
import json
import math
import pathlib
import signal
import traceback
from collections.abc import Mapping, Sequence

import jax
from absl import logging
from clu import metric_writers, parameter_overview
from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax import distributed, flops, memory, outputs, sharding
from fastslm_jax.data import loader
from fastslm_jax.data.manifest import Utterance, read_manifest
from fastslm_jax.evaluation import metrics, predict
from fastslm_jax.inference import load
from fastslm_jax.inference.generator import Generator
from fastslm_jax.training import checkpoint, config_changes, experiment, optim, specs
from fastslm_jax.training.logging import Profile, StepLog, Timer, make_writer
from fastslm_jax.training.step import TrainState
from fastslm_jax.training.wandb_writer import check_wandb


def main(_: Sequence[str]) -> None:
    with contextlib.ExitStack() as resources:  # closed in reverse order, also after an error
        try:
            train(FLAGS.config, pathlib.Path(FLAGS.workdir), resources)
        except BaseException as error:
            # Drops the last batches: they are in shared memory, which the data workers close.
            traceback.clear_frames(error.__traceback__)
            raise


def train(config: ConfigDict, workdir: pathlib.Path, resources: contextlib.ExitStack) -> None:
    distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    distributed.check_equal(command_facts(config, workdir))
    is_first_process = jax.process_index() == 0
    preemption = distributed.Preemption()
    resources.callback(preemption.close)

    with distributed.shared_errors():
        if is_first_process:
            resources.enter_context(checkpoint.lock(workdir))

        # -------------------------------------------------------------------------- mesh and model
        config_lib.check(config)
        check_wandb(config.wandb)
        mesh = sharding.make_mesh(**config.mesh)
        setup = experiment.build(config, mesh=mesh)
        model, tokenizer = setup.model, setup.prompt_tokenizer()
        step_specs = specs.build(setup, mesh)
        specs.check_capacity(step_specs, memory.capacity_of(mesh))

        # ------------------------------------------------------------------------------------ data
        rows = experiment.make_rows(config.data.train, setup, tokenizer)
        # Plans the first epoch: an example that does not fit in a row raises here.
        first_batch = [rows.examples(row) for row in range(config.global_batch_size)]
        dev = dev_sets(config.data)
        bases = setup.fingerprints()
        data = experiment.data_fingerprints(config.data.train)
    distributed.check_equal(
        {f"the manifest of config.data.train.{name}": found for name, found in data.items()}
        | {f"the content of config.base.{name}": found for name, found in bases.items()}
        | {"the order of rows": text_hash(repr(first_batch))}
    )

    # ---------------------------------------------------------------------------------- parameters
    # A later source overrides an earlier one.
    # (1) Fresh initialization: the pretrained folders, and config.seed for everything else.
    params = experiment.init_params(setup, mesh)

    # (2) config.init_from: a checkpoint of another run. Only if --workdir has none.
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
    resources.callback(checkpoints.close)  # waits for a running save
    if config.init_from and not checkpoints.steps():
        source = checkpoint.Checkpoints(config.init_from, read_only=True)
        step = load.find_step(source, config.init_from, config.init_from_step or None)
        params |= source.restore_params(step, step_specs.saved)
        logging.info("starting from %s, step %d", config.init_from, step)
        source.close()

    trained, frozen = optim.split(params, step_specs.mask)
    state_shardings, _ = step_specs.out_shardings
    create = functools.partial(TrainState.create, optimizer=setup.optimizer)
    state = jax.jit(create, out_shardings=state_shardings)(trained)
    del params, trained

    # (3) The newest checkpoint of --workdir, with optimizer state and step: this is a resume.
    restored = checkpoints.restore_latest(step_specs.saved, train_items(step_specs.state), config)
    first_row = 0
    if restored is not None:
        step, saved, train, meta = restored
        checkpoints.check_bases(step, bases)
        config_changes.warn_of_changes(meta, config, data)
        state = state.replace(trained={path: saved[path] for path in state.trained}, **train)
        frozen |= {path: leaf for path, leaf in saved.items() if path in frozen}
        first_row = meta["row"]
        logging.info("resuming from step %d, row %d", step, first_row)
        del saved, train, restored
    first_step = int(state.step) + 1

    # ------------------------------------------------------------------------------------- batches
    # The data workers start here: they prepare the first batches while the step is compiled.
    process_part, num_parts = distributed.rows_of_process(mesh)
    feed = loader.batches(
        rows,
        config.global_batch_size,
        start_row=first_row,
        process_index=process_part,
        process_count=num_parts,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )
    resources.callback(feed.close)

    # ------------------------------------------------------------------------------------- logging
    with distributed.shared_errors():
        writer = make_writer(workdir, first_step - 1, is_first_process, config)
        if is_first_process:
            write_description(workdir, config, step_specs)
    log = StepLog(
        writer=writer,
        bar=cli.Bar(
            total=config.steps,
            initial=first_step - 1,
            desc=config.name,
            unit="step",
            disable=not is_first_process,
            mininterval=2,
        ),
        timer=Timer(num_parts),
        profile=Profile(config.profile if is_first_process else "", workdir / "profile"),
        mesh=mesh,
        schedule=setup.schedule,
        first_step=first_step,
        first_row=first_row,
        last_step=config.steps,
        log_every=config.log_every,
        max_skipped=config.max_skipped,
        global_batch_size=config.global_batch_size,
        flops_per_step=sum(flops.minimum(model, setup.row, config.global_batch_size).values()),
    )
    resources.callback(log.close)

    # ----------------------------------------------------------------------------------------- jit
    with log.compiling():
        lowered = step_specs.jit().lower(step_specs.state, step_specs.frozen, step_specs.batch)
        if jax.process_count() > 1:
            program = text_hash(lowered.as_text())
            distributed.check_equal(
                {"the first step": first_step, "the program of a step": program}
            )
        train_step = lowered.compile()

    # ---------------------------------------------------------------------------------------- loop
    batches = loader.prefetch_to_devices(feed, functools.partial(sharding.shard_batch, mesh=mesh))
    preemption.accept_interrupts()
    for step in range(first_step, config.steps + 1):
        is_last = step == config.steps
        with log.timer.waiting():
            batch, sharded_batch = next(batches)
        log.begin(step, batch)
        state, step_metrics = train_step(state, frozen, sharded_batch)
        log.end(step, step_metrics)

        scores = None
        if dev and (step % config.eval_every == 0 or is_last):
            with log.timer.paused():
                # No variable keeps the generator: on a GPU it has a copy of the decoder's weights.
                scores = evaluate(
                    Generator(model, optim.merge(state.trained, frozen), tokenizer),
                    dev,
                    writer,
                    step,
                    config.eval.batch_size,
                )
            log.dev_scores = scores

        # The data position is the number of rows used, however many batches are prefetched. Save
        # before the next batch is drawn, so that no row is skipped or repeated after a resume.
        is_preempted = preemption.reached(step)
        if step % config.checkpoint_every == 0 or is_last or is_preempted or scores:
            with log.timer.paused():
                leaves = {**frozen, **state.trained}
                meta = {
                    "config": json.loads(config.to_json_best_effort()),
                    "row": log.rows(step),
                    "bases": bases,
                    "data": data,
                }
                saved = {path: leaves[path] for path in step_specs.saved}
                checkpoints.save(step, saved, train_items(state), meta, scores)
        if is_preempted and preemption.signal == signal.SIGINT:
            raise KeyboardInterrupt(f"saved step {step}; the same command resumes")
        if is_preempted:
            logging.warning("SIGTERM: saved step %d and stopped; the same command resumes", step)
            break


def command_facts(config: ConfigDict, workdir: pathlib.Path) -> dict[str, object]:
    """What must be equal on all processes before they do anything together."""
    fields = config_changes.flatten(json.loads(config.to_json_best_effort()))
    steps = sorted(int(f.name) for f in workdir.glob("checkpoints/*") if f.name.isdigit())
    return {
        "--num_processes": FLAGS.num_processes,
        "--workdir": str(workdir),
        "the list of checkpoints in --workdir": steps,  # the folder may not be shared
        **{f"config.{field}": value for field, value in fields.items()},
        "the code of train.py": text_hash(pathlib.Path(__file__).read_text(encoding="utf-8")),
        **distributed.software(),
    }


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_description(
    workdir: pathlib.Path, config: ConfigDict, step_specs: specs.StepSpecs
) -> None:
    """Writes config.json, and parameters.txt: the trained parameters and their learning rates."""
    outputs.write_text(workdir / "config.json", config.to_json_best_effort(indent=1) + "\n")
    groups = optim.learning_rate_groups(
        step_specs.trained,
        config.optimizer.name,
        config.optimizer.learning_rate,
        config.optimizer.learning_rate_ratios,
        config.optimizer.adam_learning_rate_ratio,
    )
    rates = [
        f"{pattern}: {tensors} tensors, {size:,} parameters, {rule}, learning rate {rate:g}"
        for pattern, rule, tensors, size, rate in groups
    ]
    table = parameter_overview.get_parameter_overview(step_specs.trained, include_stats=False)
    outputs.write_text(workdir / "parameters.txt", "\n".join([*rates, table]) + "\n")
    counts = optim.count(step_specs.trained), optim.count(step_specs.params)
    logging.info("%d of %d parameters are trained, see %s/parameters.txt", *counts, workdir)
    for line in rates:
        logging.info("%s", line)


def train_items(state: TrainState) -> dict:
    """What a checkpoint stores besides the parameters."""
    return {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}


# ---------------------------------------------------------------------------------- dev evaluation


def dev_sets(data: ConfigDict) -> dict[str, list[Utterance]]:
    """{label: utterances} of config.data.dev, at most dev_utterances of each task and language.

    Labels are "asr", or "asr-ko" if a task has several languages (see `predict.groups`).
    """
    groups = {}
    if data.dev:
        for task in data.dev_tasks:
            groups |= predict.by_task(read_manifest(data.dev, (task,)))
    return {label: utterances[: data.dev_utterances] for label, utterances in groups.items()}


def evaluate(
    generator: Generator,
    dev: Mapping[str, Sequence[Utterance]],
    writer: metric_writers.MetricWriter,
    step: int,
    batch_size: int,
) -> dict[str, float]:
    """Scores each task and language by its main metric; writes scores and example answers.

    Returns:
        {metric: mean over the tasks and languages scored by it}.
    """
    values, by_language = collections.defaultdict(list), {}
    for label, utterances in dev.items():
        task, _, lang = label.partition("-")
        predictions = predict.predictions(generator, utterances, batch_size=batch_size)
        metric = metrics.main_metric(task, utterances[0].lang)
        values[metric].append(predict.summarize(predictions).get(metric, math.nan))
        if lang:
            by_language[f"dev/{metric}-{lang}"] = values[metric][-1]
        examples = "\n\n".join(
            f"reference: {p['reference']}\n\nhypothesis: {p['hypothesis']}" for p in predictions[:5]
        )
        writer.write_texts(step, {f"dev/{label}": examples})
    scores = {metric: sum(parts) / len(parts) for metric, parts in values.items()}
    means = {f"dev/{metric}": value for metric, value in scores.items()}
    writer.write_scalars(step, means | by_language)
    writer.flush()
    return scores


if __name__ == "__main__":
    cli.run(main, REQUIRED)
