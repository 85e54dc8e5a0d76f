"""Linear probes of trained models: what their speech tokens keep, by `fastslm_jax.probes`."""

import dataclasses
import json
import pathlib

from fastslm_jax.ablate import robustness
from fastslm_jax.demo.phases import Phases

QUESTION = "What do the speech tokens keep beyond words?"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """All probes of the demo's model, on the clips of a seed.

    Attributes:
        checkpoint: its workdir.
    """

    seed: int
    checkpoint: str = robustness.MODEL

    @property
    def name(self) -> str:
        return f"{pathlib.Path(self.checkpoint).name}, seed {self.seed}"

    def folder(self, runs: pathlib.Path) -> pathlib.Path:
        return runs / f"probes-{pathlib.Path(self.checkpoint).name}-seed{self.seed}"

    def command(self, runs: pathlib.Path) -> list[str]:
        flags = [f"--checkpoint={self.checkpoint}", f"--out={self.folder(runs)}"]
        return ["-m", "fastslm_jax.probes", *flags, f"--seed={self.seed}"]

    def is_done(self, runs: pathlib.Path) -> bool:
        return Phases(self.folder(runs)).is_done("probes", self.command(runs))

    def execute(self, runs: pathlib.Path) -> None:
        """Raises UserError if the command failed."""
        folder = self.folder(runs)
        folder.mkdir(parents=True, exist_ok=True)
        Phases(folder).run("probes", self.command(runs), log=folder / "probes.log")

    def records(self, runs: pathlib.Path) -> list[dict]:
        """The lines of results.jsonl of a finished run: one for each target and features."""
        folder = self.folder(runs)
        found = json.loads((folder / "probes.json").read_text(encoding="utf-8"))["results"]
        seconds = Phases(folder).state["probes"]["seconds"]
        return [
            {
                "suite": "probes",
                "variant": f"{pathlib.Path(self.checkpoint).name}: {result['target']}",
                "features": result["features"],
                "seed": self.seed,
                "difference": {},
                **robustness.costs(self.checkpoint),
                "steps": 0,
                "seconds": round(seconds / len(found), 1),
                "scores": {"test": result},
            }
            for result in found
        ]


def plan(seeds: int) -> list[Run]:
    return [Run(seed) for seed in range(seeds)]
