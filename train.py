"""Trains FastSLM.

    python train.py --config=configs/demo.py:1 --workdir=runs/demo/stage1 [--config.steps=100 ...]

Run again with the same workdir, it goes on where it was. The workdir holds checkpoints/, metrics.jsonl, TensorBoard events
and config.json.
"""

import functools
import json
import pathlib
import signal

import jax
from absl import flags, logging
from clu import metric_writers, parameter_overview
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags
from tqdm import tqdm

from fastslm_jax import cli, evaluation, experiment, optim, sharding, steps
from fastslm_jax.checkpoint import CheckpointError, Checkpoints
from fastslm_jax.data import pipeline
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.decode import Generator
from fastslm_jax.errors import UserError
from fastslm_jax.logs import JsonLinesWriter, Timer, lock, name_changes

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment, for example configs/demo.py:1.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
    is_first_process = jax.process_index() == 0
    held = lock(workdir) if is_first_process else None  # noqa: F841 (held until the process ends)

    # ------------------------------------------------------------------------------------------------ mesh and model
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_rows, config.accumulate, mesh)
    setup = experiment.build(config)
    model, encoder = setup.model, setup.prompt_encoder()

    # ---------------------------------------------------------------------------------------------------------- data
    rows = experiment.make_rows(config, setup, encoder)
    rows.examples(0)  # plans the first epoch: an example that fits no row ends the run here
    dev = dev_sets(config)

    # ------------------------------------------------------------------------------------ parameters: init or restore
    params = experiment.init_params(setup, config.model.base_dtype, mesh, config.seed)
    mask = optim.trainable_mask(sorted(params), config.trainable)
    saved_paths = experiment.saved_paths(params, config.trainable)
    schedule = optim.schedule(
        config.optimizer.schedule, config.optimizer.learning_rate, config.steps, config.optimizer.warmup_steps,
        config.optimizer.final_fraction,
    )  # fmt: skip
    optimizer = optim.make_optimizer(
        config.optimizer.name, schedule, weight_decay=config.optimizer.weight_decay, b1=config.optimizer.b1,
        b2=config.optimizer.b2, clip_norm=config.optimizer.clip_norm,
        adam_learning_rate_ratio=config.optimizer.adam_learning_rate_ratio,
        llm_learning_rate_ratio=config.optimizer.llm_learning_rate_ratio,
    )  # fmt: skip

    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    if config.init_from and not checkpoints.steps():
        start = Checkpoints(config.init_from, read_only=True)
        if not start.steps():
            raise CheckpointError(f"config.init_from={config.init_from}: holds no finished checkpoint; train that stage first")
        params |= start.restore_params(start.steps()[-1], abstract({path: params[path] for path in saved_paths}))
        start.close()
        logging.info("starting from %s, step %d", config.init_from, start.steps()[-1])

    trained = {path: leaf for path, leaf in params.items() if mask[path]}
    frozen = {path: leaf for path, leaf in params.items() if not mask[path]}
    state = jax.jit(functools.partial(steps.TrainState.create, optimizer=optimizer))(trained)
    state = jax.device_put(state, state_shardings(state, mesh))
    fingerprints = setup.fingerprints()
    restored = checkpoints.restore_latest(abstract({path: params[path] for path in saved_paths}), abstract(train_items(state)))
    if restored is not None:
        step, saved, train, meta = restored
        checkpoints.check_bases(step, fingerprints)
        name_changes(meta, config)
        state = state.replace(trained={path: saved[path] for path in trained}, **train)
        frozen |= {path: leaf for path, leaf in saved.items() if path in frozen}
        logging.info("going on from step %d, row %d", step, meta["row"])
    first_step = int(state.step)

    # ----------------------------------------------------------------------------------------------------------- jit
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    train_step = jax.jit(
        functools.partial(
            steps.train_step, model=model, optimizer=optimizer, seed=config.seed, label_slots=rows.shape.labels,
            loss_chunk=config.loss_chunk, accumulate=config.accumulate,
        ),
        in_shardings=(shardings, {path: leaf.sharding for path, leaf in frozen.items()}, NamedSharding(mesh, sharding.ROWS)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- logs
    writer = metric_writers.MultiWriter(
        [
            metric_writers.create_default_writer(workdir, just_logging=not is_first_process, asynchronous=False),
            *([JsonLinesWriter(workdir / "metrics.jsonl", first_step)] if is_first_process else []),
        ]
    )
    if is_first_process:
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
        if not first_step:
            logging.info("trained parameters:\n%s", parameter_overview.get_parameter_overview(trained, include_stats=False))
            logging.info("%d of %d parameters are trained", optim.count(trained), optim.count(params))
    stop_signals = []
    signal.signal(signal.SIGTERM, lambda *_: stop_signals.append("SIGTERM"))

    # ---------------------------------------------------------------------------------------------------------- loop
    batches = pipeline.batches(
        rows, config.batch_rows, start_row=first_step * config.batch_rows, process_index=jax.process_index(),
        process_count=jax.process_count(), workers=config.data.workers, prefetch=config.data.prefetch,
    )  # fmt: skip
    timer, dev_scores = Timer(), {}
    bar = tqdm(total=config.steps, initial=first_step, desc=config.name, unit="step", disable=not is_first_process, mininterval=2)
    for step in range(first_step + 1, config.steps + 1):
        with timer.waiting():
            batch = next(batches)
        timer.count(batch)
        state, metrics = train_step(state, frozen, sharding.shard_batch(batch, mesh))
        bar.update()

        if step % config.log_every == 0 or step in (1, config.steps):
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if metrics["skipped"] >= config.max_skipped:
                last_row = step * config.batch_rows
                raise UserError(
                    f"{int(metrics['skipped'])} steps in a row had no finite loss or gradients, the last with rows "
                    f"{last_row - config.batch_rows} to {last_row - 1}; lower config.optimizer.learning_rate or look at them"
                )
            writer.write_scalars(step, {**metrics, "learning_rate": float(schedule(step - 1)), **timer.rates()})
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", **{name: f"{value:.1f}" for name, value in dev_scores.items()})

        is_last = step == config.steps or bool(stop_signals)
        if dev and (step % config.eval_every == 0 or step == config.steps):
            with timer.paused():
                generator = Generator(model, optim.merge(state.trained, frozen), encoder)
                dev_scores = evaluate(generator, dev, writer, step, config.eval.batch_size)
        # The order is an invariant: a checkpoint is begun before the next batch is drawn, so step and row number agree.
        if step % config.checkpoint_every == 0 or is_last:
            with timer.paused():
                leaves = {**frozen, **state.trained}
                meta = {
                    "config": json.loads(config.to_json_best_effort()),
                    "row": step * config.batch_rows,
                    "bases": fingerprints,
                }
                checkpoints.save(step, {path: leaves[path] for path in saved_paths}, train_items(state), meta, dev_scores or None)
        if stop_signals:
            logging.warning("%s: saved step %d, stopping; run the same command to go on", stop_signals[0], step)
            break
    bar.close()
    checkpoints.wait()
    checkpoints.close()
    writer.close()


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def train_items(state: steps.TrainState) -> dict:
    """What a checkpoint holds beside the parameters."""
    return {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}


def state_shardings(state: steps.TrainState, mesh):
    """Leaves of the optimiser lie like the parameter whose path and shape they have; all others are replicated."""
    by_path = sharding.parameter_shardings(state.trained, mesh)

    def place(key_path, leaf):
        path = next((key.key for key in key_path if getattr(key, "key", None) in by_path), None)
        is_like = path is not None and leaf.shape == state.trained[path].shape
        return by_path[path] if is_like else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def dev_sets(config):
    """{task: utterances} of the dev manifest, dev_utterances of each task."""
    if not config.data.dev:
        return {}
    return {task: read_manifest(config.data.dev, (task,))[: config.data.dev_utterances] for task in config.data.dev_tasks}


def evaluate(generator, dev, writer, step, batch_size) -> dict[str, float]:
    """Scores the dev sets; writes scores and example answers. Returns the score of each task under its metric's name."""
    main_metric = {"asr": "wer", "ast": "chrf", "ssum": "rougeL", "sqqa": "em"}
    scores = {}
    for task, utterances in dev.items():
        predictions = evaluation.predict(generator, utterances, batch_size=batch_size)
        scores[main_metric[task]] = evaluation.summarize(predictions)[main_metric[task]]
        examples = "\n\n".join(f"reference: {p['reference']}\n\nhypothesis: {p['hypothesis']}" for p in predictions[:5])
        writer.write_texts(step, {f"dev/{task}": examples})
    writer.write_scalars(step, {f"dev/{name}": value for name, value in scores.items()})
    writer.flush()
    return scores


if __name__ == "__main__":
    cli.run(main)
