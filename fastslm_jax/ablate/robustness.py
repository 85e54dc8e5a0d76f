"""WER against the strength of spontaneous speech, voice and acoustics, of trained models."""

import dataclasses
import functools
import pathlib
import random

from fastslm_jax.ablate import runs as trained_runs
from fastslm_jax.demo import examples
from fastslm_jax.demo.phases import Phases
from fastslm_jax.inference import load
from fastslm_jax.synthesis import corpus, engines
from fastslm_jax.synthesis.augment import Channel
from fastslm_jax.synthesis.manner import Manner
from fastslm_jax.training.checkpoint import Checkpoints

QUESTION = "How robust is a trained model?"
MODEL = "assets/demo_model"
CLEAN = "clean"
CLIPS = 100  # of a set
STRENGTHS = {  # field of Manner: strengths, without the one that changes nothing
    "hesitations": (0.1, 0.2, 0.4),
    "repetitions": (0.1, 0.2, 0.4),
    "restarts": (0.25, 0.5, 1.0),
    "rate": (0.6, 0.8, 1.25, 1.5, 2.0),
    "pitch": (-6.0, -3.0, 3.0, 6.0),
    "snr_db": (20.0, 10.0, 5.0, 0.0),
    "reverb_seconds": (0.3, 0.6, 1.0, 1.5),
}


def held_out_sentences(count: int, seed: int) -> list[str]:
    """Different test sentences of the demo, whose words its model knows."""
    rng, found = random.Random(f"robustness/{seed}"), {}
    while len(found) < count:
        found.setdefault(examples.draw_example("asr", rng, "test").text)
    return list(found)


@functools.cache
def costs(checkpoint: str) -> dict:
    """`runs.costs` of the model of a checkpoint."""
    checkpoints = Checkpoints(checkpoint, read_only=True)
    step = load.find_step(checkpoints, checkpoint)
    config = load.saved_config(checkpoints, checkpoint, step)
    checkpoints.close()
    return trained_runs.costs(config)


@dataclasses.dataclass(frozen=True)
class Set:
    """A test set: one effect at one strength."""

    name: str
    effect: str = ""
    strength: float | None = None

    @property
    def manner(self) -> Manner:
        return Manner(**{self.effect: self.strength}) if self.effect else Manner()


SETS = (
    Set(CLEAN),
    *(
        Set(f"{effect}_{number}", effect, strength)  # a set's name has no points and signs
        for effect, strengths in STRENGTHS.items()
        for number, strength in enumerate(strengths, 1)
    ),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """All sets of a seed, transcribed by the demo's model.

    Attributes:
        checkpoint: its workdir.
        clips: of each set.
    """

    seed: int
    checkpoint: str = MODEL
    clips: int = CLIPS

    @property
    def name(self) -> str:
        return f"{pathlib.Path(self.checkpoint).name}, seed {self.seed}"

    def folder(self, runs: pathlib.Path) -> pathlib.Path:
        return runs / f"robustness-{pathlib.Path(self.checkpoint).name}-seed{self.seed}"

    def command(self, runs: pathlib.Path) -> list[str]:
        folder = self.folder(runs)
        return [
            *("eval.py", f"--config=configs/saved.py:{self.checkpoint}", f"--workdir={folder}"),
            f"--sets={','.join(each.name for each in SETS)}",
            *(f"--config.eval.sets.{s.name}={folder}/speech/{s.name}/train.jsonl" for s in SETS),
        ]

    def is_done(self, runs: pathlib.Path) -> bool:
        return Phases(self.folder(runs)).is_done("eval", self.command(runs))

    def execute(self, runs: pathlib.Path) -> None:
        """Makes the sets that are missing, and transcribes them.

        Raises:
            UserError: espeak-ng is not installed, or the evaluation failed.
        """
        folder = self.folder(runs)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = folder / "checkpoints"  # so that the scores are written here
        if not checkpoints.is_symlink():
            checkpoints.symlink_to(pathlib.Path(self.checkpoint).resolve() / "checkpoints")
        voices, sentences = engines.parse("espeak"), held_out_sentences(self.clips, self.seed)
        for each in SETS:
            recipe = corpus.Recipe(
                tuple(sentences),
                (voices,),
                self.seed,
                no_speech=0.0,
                dev=0.0,
                channel=Channel(0.0, 0.0, 0.0, 0.0),
                manner=each.manner,
            )
            out = folder / "speech" / each.name
            if not (out / "summary.json").exists():
                corpus.build(recipe, out, self.clips)
        Phases(folder).run("eval", self.command(runs), log=folder / "eval.log")

    def records(self, runs: pathlib.Path) -> list[dict]:
        """The lines of results.jsonl of a finished run: one for each set."""
        folder = self.folder(runs)
        scores = trained_runs.scores(folder / "eval")
        seconds = Phases(folder).state["eval"]["seconds"]
        return [
            {
                "suite": "robustness",
                "variant": f"{each.effect} {each.strength:g}" if each.effect else CLEAN,
                "model": pathlib.Path(self.checkpoint).name,
                "seed": self.seed,
                "difference": {each.effect: each.strength} if each.effect else {},
                **costs(self.checkpoint),
                "steps": 0,
                "seconds": round(seconds / len(SETS), 1),
                "scores": {"test": scores[each.name]},
            }
            for each in SETS
        ]


def plan(seeds: int) -> list[Run]:
    return [Run(seed) for seed in range(seeds)]
