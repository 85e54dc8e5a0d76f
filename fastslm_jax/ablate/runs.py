"""Runs of the experiments: each is a chain of trainings by train.py, scored by eval.py.

A training has a folder of its own, WORKDIR/runs/NAME, named after what it changes: experiments
share the trainings that they have in common, and a killed one resumes.
"""

import dataclasses
import json
import pathlib
import re

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax import flops, outputs
from fastslm_jax.ablate.suites import Stage, Suite, Variant
from fastslm_jax.demo.phases import Phases
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import predict, results
from fastslm_jax.training import experiment, optim

LONG = "recordings"  # the set whose recordings are decoded in one context
# Upper ends of the lengths in minutes; recordings end up to one sentence earlier.
MINUTES = (0.5, 1, 3, 5, 10)
CONSEQUENCES = ("data.row.tokens", "optimizer.learning_rate_ratios")  # of other changes


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A training of a stage.

    Attributes:
        stage: its config.
        changes: {field: value} of the config.
        seed: config.seed.
        before: the training that it starts from.
    """

    stage: Stage
    changes: dict[str, object]
    seed: int
    before: "Training | None" = None

    @property
    def name(self) -> str:
        """Of its folder: "seed0-stage1-detail_recovery_layers_0"."""
        known = {*CONSEQUENCES, *(self.before.changes if self.before else ())}
        new = [f"{f.split('.')[-1]}_{v}" for f, v in self.changes.items() if f not in known]
        start = self.before.name if self.before else f"seed{self.seed}"
        return "-".join([start, self.stage.name, *(re.sub(r"\W+", "_", part) for part in new)])

    def flags(self, runs: pathlib.Path) -> list[str]:
        """Of train.py and eval.py."""
        found = [*self.stage.flags, f"--workdir={runs / self.name}", f"--config.seed={self.seed}"]
        if self.before:
            found.append(f"--config.init_from={runs / self.before.name}")
        return found + [f"--config.{field}={value}" for field, value in self.changes.items()]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A variant of an experiment with a seed.

    Attributes:
        training: the last one.
        sets: {name: manifest} of the test sets.
        has_lengths: whether LONG is scored as well.
    """

    suite: str
    variant: str
    training: Training
    sets: dict[str, str]
    has_lengths: bool

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.training.seed}"

    def commands(self, runs: pathlib.Path) -> list[tuple[Training, str, list[str]]]:
        """(training, phase, command) in order."""
        chain, training = [], self.training
        while training:
            chain.insert(0, (training, "train", ["train.py", *training.flags(runs)]))
            training = training.before
        command = ["eval.py", *self.training.flags(runs), "--tasks=asr"]
        command += [f"--config.eval.sets.{name}={path}" for name, path in self.sets.items()]
        names = ",".join(name for name in self.sets if name != LONG)
        chain.append((self.training, "eval", [*command, f"--sets={names}"]))
        if self.has_lengths:
            one_context = [f"--sets={LONG}", "--span=none", "--noredo_loops"]
            chain.append((self.training, "eval_long", [*command, *one_context]))
        return chain

    def is_done(self, runs: pathlib.Path) -> bool:
        return all(
            Phases(runs / training.name).is_done(phase, command)
            for training, phase, command in self.commands(runs)
        )

    def execute(self, runs: pathlib.Path) -> None:
        """Runs what is not done yet.

        Raises:
            UserError: a command failed, or the folder has a run with other flags.
        """
        for training, phase, command in self.commands(runs):
            folder = runs / training.name
            folder.mkdir(parents=True, exist_ok=True)
            Phases(folder).run(phase, command, log=folder / f"{phase}.log")

    def records(self, runs: pathlib.Path) -> list[dict]:
        """The lines of results.jsonl of a finished run: one."""
        folder, trainings = runs / self.training.name, [self.training]
        while trainings[0].before:
            trainings.insert(0, trainings[0].before)
        phases = [Phases(runs / training.name).state["train"] for training in trainings]
        steps = [t.changes.get("steps", t.stage.config.steps) for t in trainings]
        found = {
            "suite": self.suite,
            "variant": self.variant,
            "seed": self.training.seed,
            "difference": {t.stage.name: t.changes for t in trainings},
            **model_costs(folder),
            "steps": sum(steps),
            "seconds": round(sum(phase["seconds"] for phase in phases)),
            "scores": scores(folder / "eval", has_lengths=self.has_lengths),
        }
        if self.has_lengths:
            found["wer_by_minutes"] = wer_by_minutes(folder / "eval" / LONG / "asr")
        return [found]


def plan(name: str, suite: Suite, stage1: Stage, stage2: Stage | None, seeds: int) -> list[Run]:
    """All runs of an experiment, seed by seed.

    Raises:
        UserError: a variant does not fit the config, or it names no test set.
    """
    sets = stage1.config.eval.sets.to_dict()
    if not sets.keys() - {LONG}:
        raise UserError("config.eval.sets: add a test set, --config.eval.sets.test=MANIFEST")
    if suite.has_lengths and LONG not in sets:
        raise UserError(
            f"config.eval.sets: add long recordings, --config.eval.sets.{LONG}=MANIFEST"
        )
    return [
        Run(name, label, _training(variant, stage1, stage2, seed), sets, suite.has_lengths)
        for seed in range(seeds)
        for label, variant in suite.variants.items()
    ]


def _training(variant: Variant, stage1: Stage, stage2: Stage | None, seed: int) -> Training:
    first = Training(stage1, stage1.resolve({**variant.model, **variant.stage1}), seed)
    if variant.stage2 is None:
        return first
    return Training(stage2, stage2.resolve({**variant.model, **variant.stage2}), seed, first)


# ------------------------------------------------------------------------------------------ results


def model_costs(folder: pathlib.Path) -> dict:
    """Parameters, and FLOPs of a training step per second of audio, of the model of a training."""
    cache = folder / "costs.json"
    if cache.exists():
        return json.loads(cache.read_text(encoding="utf-8"))
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = costs(config_lib.from_saved(saved))
    outputs.write_text(cache, json.dumps(found))
    return found


def costs(config: ConfigDict) -> dict:
    """{"parameters": {"adapter", "trained", "all"}, "flops_per_audio_second"} of a config.

    Those of the adapter are trained as well. FLOPs: forward and backward pass of a full row
    (`flops.minimum`).
    """
    setup = experiment.build(config, weights=False)
    params = experiment.abstract_params(setup.model, setup.base_dtype)
    mask = optim.trainable_mask(sorted(params), setup.trainable)
    trained = [path for path in params if mask[path]]
    parts = {
        "adapter": [path for path in trained if not path.startswith(("encoder/", "llm/"))],
        "trained": trained,
        "all": list(params),
    }
    seconds = setup.row.windows * setup.model.window.seconds
    return {
        "parameters": {
            name: optim.count({path: params[path] for path in paths})
            for name, paths in parts.items()
        },
        "flops_per_audio_second": round(
            sum(flops.minimum(setup.model, setup.row).values()) / seconds
        ),
    }


def scores(folder: pathlib.Path, *, has_lengths: bool = True) -> dict[str, dict[str, float]]:
    """{set: {score: value}} of the transcriptions below WORKDIR/eval."""
    found = {}
    paths = folder.glob(f"*/asr/{results.METRICS}")
    for path in sorted(paths, key=lambda path: (LONG in path.parts, path)):
        name = path.parent.parent.name
        if name != LONG or has_lengths:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
    return found


def wer_by_minutes(folder: pathlib.Path) -> dict[str, float]:
    """{minutes: corpus WER in %} of a set, by the length up to which a recording goes."""
    edges = [0.0, *(60 * minutes + 1 for minutes in MINUTES)]
    labels = [*(f"{minutes:g}" for minutes in MINUTES), f">{MINUTES[-1]}"]
    names = dict(zip(edges, labels, strict=True))
    found = results.read_predictions(folder / results.PREDICTIONS)
    buckets = predict.wer_by_duration(found, edges)
    return {names[bucket["from"]]: bucket["wer"] for bucket in buckets}
