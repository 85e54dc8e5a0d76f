"""Trains FastSLM.

    python train.py --config=configs/demo.py:1 --workdir=runs/demo/stage1 [--config.steps=100 ...]

Run again with the same workdir, it goes on where it was. The workdir holds checkpoints/, metrics.jsonl, TensorBoard events
and config.json. On several hosts every process runs the same command (docs/scale.md).
"""

import collections
import functools
import json
import pathlib

import jax
from absl import flags, logging
from clu import metric_writers, parameter_overview
from ml_collections import config_flags
from tqdm import tqdm

from fastslm_jax import chips, cli, devices, distributed, flops, memory, sharding
from fastslm_jax.data import rows as pipeline
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict as evaluation
from fastslm_jax.inference.generator import Generator
from fastslm_jax.models import attention
from fastslm_jax.training import build as training
from fastslm_jax.training import experiment, optim
from fastslm_jax.training import step as steps
from fastslm_jax.training.checkpoint import CheckpointError, Checkpoints
from fastslm_jax.training.logging import (
    JsonLinesWriter,
    Profile,
    Timer,
    lock,
    name_changes,
)

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config", None, "The experiment, for example configs/demo.py:1.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
distributed.define_flags()


def main(_):
    config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
    distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    is_first_process = jax.process_index() == 0
    held = lock(workdir) if is_first_process else None  # noqa: F841 (held until the process ends)
    preemption = distributed.Preemption()

    # ------------------------------------------------------------------------------------------------ mesh and model
    mesh = sharding.make_mesh(**config.mesh)
    setup = experiment.build(config, mesh=mesh)
    model, encoder = setup.model, setup.prompt_tokenizer()
    built = training.build(config, setup, mesh)
    training.check_capacity(config, setup, built, mesh, memory.capacity_of(mesh))

    # ---------------------------------------------------------------------------------------------------------- data
    rows = experiment.make_rows(config, setup, encoder)
    rows.examples(0)  # plans the first epoch: an example that fits no row ends the run here
    dev = dev_sets(config)

    # ------------------------------------------------------------------------------------ parameters: init or restore
    params = experiment.init_params(setup, config.model.base_dtype, mesh, config.seed)
    saved_paths = experiment.saved_paths(params, config.trainable)
    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    if config.init_from and not checkpoints.steps():
        start = Checkpoints(config.init_from, read_only=True)
        if not start.steps():
            raise CheckpointError(
                f"config.init_from={config.init_from}: holds no finished checkpoint; train that stage first"
            )
        params |= start.restore_params(
            start.steps()[-1], {path: built.params[path] for path in saved_paths}
        )
        start.close()
        logging.info("starting from %s, step %d", config.init_from, start.steps()[-1])

    trained = {path: leaf for path, leaf in params.items() if built.mask[path]}
    frozen = {path: leaf for path, leaf in params.items() if not built.mask[path]}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, built.state)
    state = jax.jit(
        functools.partial(steps.TrainState.create, optimizer=built.optimizer),
        out_shardings=shardings,
    )(trained)
    del params, trained
    fingerprints, data = setup.fingerprints(), experiment.data_fingerprints(config)
    restored = checkpoints.restore_latest(
        {path: built.params[path] for path in saved_paths}, train_items(built.state)
    )
    if restored is not None:
        step, saved, train, meta = restored
        checkpoints.check_bases(step, fingerprints)
        name_changes(meta, config, data)
        state = state.replace(trained={path: saved[path] for path in built.trained}, **train)
        frozen |= {path: leaf for path, leaf in saved.items() if path in frozen}
        logging.info("going on from step %d, row %d", step, meta["row"])
        del saved, train, restored
    first_step = int(state.step)

    # ---------------------------------------------------------------------------------------------------------- logs
    writer = metric_writers.MultiWriter(
        [
            metric_writers.create_default_writer(
                workdir, just_logging=not is_first_process, asynchronous=False
            ),
            *([JsonLinesWriter(workdir / "metrics.jsonl", first_step)] if is_first_process else []),
        ]
    )
    if is_first_process:
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
        if not first_step:
            logging.info(
                "trained parameters:\n%s",
                parameter_overview.get_parameter_overview(built.trained, include_stats=False),
            )
            logging.info(
                "%d of %d parameters are trained",
                optim.count(built.trained),
                optim.count(built.params),
            )
    profile = Profile(config.profile if is_first_process else "", workdir / "profile")
    part, parts = distributed.rows_of_process(mesh)
    timer, compiled, first_programs = Timer(parts), devices.Compiled(), 0
    flops_per_step = sum(flops.minimum(model, rows.shape, config.global_batch_size).values())
    dev_scores, pending, stopped, not_finite = {}, collections.deque(), False, 0

    # ---------------------------------------------------------------------------------------------------------- loop
    batches = pipeline.batches(
        rows, config.global_batch_size, start_row=first_step * config.global_batch_size, process_index=part, process_count=parts,
        workers=config.data.workers, prefetch=config.data.prefetch,
    )  # fmt: skip
    batches = pipeline.ahead(batches, functools.partial(sharding.shard_batch, mesh=mesh))
    bar = tqdm(
        total=config.steps,
        initial=first_step,
        desc=config.name,
        unit="step",
        disable=not is_first_process,
        mininterval=2,
    )
    for step in range(first_step + 1, config.steps + 1):
        with timer.waiting():
            batch, on_devices = next(batches)
        timer.count(batch)
        profile.begin(step)
        before = devices.compiled_so_far()
        state, metrics = built.train_step(state, frozen, on_devices)
        compiled += devices.compiled_so_far() - before
        profile.end(step, metrics)
        bar.update()

        # The step before is looked at while this one runs; on steps that are logged, this one too.
        is_logged = step % config.log_every == 0 or step in (first_step + 1, config.steps)
        pending.append((step, metrics))
        while len(pending) > (not is_logged):
            not_finite += not check_finite(*pending.popleft(), config)
            timer.finished()
        if step == first_step + 1:
            first_programs = compiled.programs
            for choice, count in sorted(attention.CHOICES.items()):
                logging.info("attention by %s (%d times)", choice, count)
        if is_logged:
            rates = timer.rates()
            rates |= speed(flops_per_step, rates.get("step_seconds"), mesh)
            rates |= {
                "compile_seconds": compiled.seconds,
                "recompilations": compiled.programs - first_programs,
            }
            rates["skipped_total"] = not_finite
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            writer.write_scalars(
                step, {**metrics, "learning_rate": float(built.schedule(step - 1)), **rates}
            )
            bar.set_postfix(
                loss=f"{metrics['loss']:.3f}",
                **{name: f"{value:.1f}" for name, value in dev_scores.items()},
            )

        scored = None
        if dev and (step % config.eval_every == 0 or step == config.steps):
            with timer.paused():
                generator = Generator(model, optim.merge(state.trained, frozen), encoder)
                scored = dev_scores = evaluate(generator, dev, writer, step, config.eval.batch_size)
        stopped = preemption.reached(step)
        # The data position follows from the step, however many batches were drawn ahead.
        if step % config.checkpoint_every == 0 or step == config.steps or stopped:
            with timer.paused():
                leaves = {**frozen, **state.trained}
                meta = {
                    "config": json.loads(config.to_json_best_effort()),
                    "row": step * config.global_batch_size,
                    "bases": fingerprints,
                    "data": data,
                }
                checkpoints.save(
                    step,
                    {path: leaves[path] for path in saved_paths},
                    train_items(state),
                    meta,
                    scored,
                )
        if stopped:
            logging.warning("SIGTERM: saved step %d, stopping; run the same command to go on", step)
            break
    bar.close()
    profile.stop()
    checkpoints.wait()
    checkpoints.close()
    writer.close()


def train_items(state: steps.TrainState) -> dict:
    """What a checkpoint holds beside the parameters."""
    return {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}


def check_finite(step: int, metrics, config) -> bool:
    """Was the step taken? Says so if it was skipped, and ends the run when too many in a row were."""
    skipped = int(metrics["skipped"])
    if skipped:
        logging.warning(
            "step %d: loss or gradients are not finite, skipped (%d in a row)", step, skipped
        )
    if skipped >= config.max_skipped:
        first, last = (
            (step - skipped) * config.global_batch_size,
            step * config.global_batch_size - 1,
        )
        raise UserError(
            f"{skipped} steps in a row (up to step {step}) had no finite loss or gradients: rows {first} to {last} of the data; "
            "look at them, or lower config.optimizer.learning_rate"
        )
    return not skipped


def speed(flops_per_step: float, step_seconds: float | None, mesh) -> dict[str, float]:
    """FLOP/s of the model's minimum with all slots of the rows counted, and what part of the chips' peak that is (MFU)."""
    if not step_seconds:
        return {}
    rate, chip = flops_per_step / step_seconds, chips.of_device(mesh.devices.flat[0])
    peak = chip and chip.peak_flops * mesh.size / chip.devices
    return {"flops_per_second": rate} | ({"mfu": rate / peak} if peak else {})


def dev_sets(config):
    """{task: utterances} of the dev manifest, dev_utterances of each task."""
    if not config.data.dev:
        return {}
    return {
        task: read_manifest(config.data.dev, (task,))[: config.data.dev_utterances]
        for task in config.data.dev_tasks
    }


def evaluate(generator, dev, writer, step, batch_size) -> dict[str, float]:
    """Scores the dev sets; writes scores and example answers. Returns the score of each task under its metric's name."""
    main_metric = {"asr": "wer", "ast": "chrf", "ssum": "rougeL", "sqqa": "em"}
    scores = {}
    for task, utterances in dev.items():
        predictions = evaluation.predictions(generator, utterances, batch_size=batch_size)
        scores[main_metric[task]] = evaluation.summarize(predictions)[main_metric[task]]
        examples = "\n\n".join(
            f"reference: {p['reference']}\n\nhypothesis: {p['hypothesis']}" for p in predictions[:5]
        )
        writer.write_texts(step, {f"dev/{task}": examples})
    writer.write_scalars(step, {f"dev/{name}": value for name, value in scores.items()})
    writer.flush()
    return scores


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
