"""Plans of the full-size stages, kept in a JSON-lines file and rendered as a page.

Each plan runs `python -m fastslm_jax.plan` in a separate process. Existing results are skipped
unless their command has changed, so an interrupted run resumes.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping

from absl import flags

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("stage1_shortform", "stage2_longform", "stage3_instruct")
ROWS_PER_CHIP = {"stage1_shortform": 4, "stage2_longform": 1, "stage3_instruct": 1}
EFFORTS = ("default", "O0", "O1", "O2", "O3")
FLAGS = flags.FLAGS

COLUMNS = (
    "config",
    "devices",
    "data × fsdp × tensor",
    "rows per chip",
    "peak, GiB",
    "executed / minimum",
    "sent per chip, GiB: within / between",
    "largest gather, GiB",
    "compute / memory / interconnect, s",
    "MFU bound",
    "audio hours per day, bound",
    "effort",
    "compile, s",
    "commit",
    "targets",
)


@dataclasses.dataclass(frozen=True)
class Page:
    """A table of plans.

    Attributes:
        name: of docs/NAME.jsonl and docs/NAME.md.
        introduction: text above the table.
        topologies: its rows, for each stage.
        overrides: topology → flags of the config.
        misses: plan → names of the targets that it does not meet.
        closing: text below the commands.
        more_rows: topology → factor of ROWS_PER_CHIP, for chips with memory for more.
    """

    name: str
    introduction: str
    topologies: tuple[str, ...]
    overrides: Callable[[str], tuple[str, ...]]
    misses: Callable[[dict], list[str]]
    closing: str = ""
    more_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> pathlib.Path:
        return ROOT / f"docs/{self.name}.jsonl"

    def command(self, stage: str, topology: str) -> list[str]:
        rows = ROWS_PER_CHIP[stage] * self.more_rows.get(topology, 1)
        return [
            "-m",
            "fastslm_jax.plan",
            f"--config=configs/{stage}.py",
            f"--topology={topology}",
            f"--rows_per_chip={rows}",
            *self.overrides(topology),
        ]

    def run(self, stage: str, topology: str) -> dict | None:
        """The plan as `fastslm_jax.plan` reports it; None if it failed."""
        print(f"{stage} {topology}: compiling", flush=True)
        arguments = self.command(stage, topology)
        done = subprocess.run(
            [sys.executable, *arguments, f"--effort={FLAGS.effort}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            return None
        plan = json.loads(done.stdout.splitlines()[-1])
        return {"stage": stage, "command": arguments, "commit": commit(), **plan}

    def stored(self) -> dict[tuple[str, str], dict]:
        """{(stage, topology): result} of stored plans whose command has not changed."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        results = {(r["stage"], r["topology"]): r for r in map(json.loads, lines)}
        return {key: r for key, r in results.items() if r["command"] == self.command(*key)}

    def row(self, stage: str, topology: str, r: dict | None) -> str:
        if r is None:
            cells = [stage, topology, "not run", *[""] * (len(COLUMNS) - 4)]
        else:
            bounds, mesh = r["bound_seconds"], r["mesh"]
            sent = f"{r['collective_gib']:.2f}"
            if "networks" in r:
                sent = " / ".join(f"{r['networks'][name]['gib']:.2f}" for name in ("ici", "dcn"))
            cells = [
                stage,
                topology,
                f"{mesh['data']} × {mesh['fsdp']} × {mesh['tensor']}",
                f"{r['rows_per_chip']:g}",
                f"{r['hbm_peak_gib']:.2f} ({r['hbm_peak_gib'] / r['hbm_capacity_gib']:.0%})",
                f"{r['flops_executed'] / r['flops_minimum']:.3f}",
                sent,
                f"{r['largest_gather_gib']:.3f}",
                f"{bounds['compute']:.3f} / {bounds['memory']:.3f} / {bounds['interconnect']:.3f}",
                f"{r['mfu_bound']:.0%}",
                f"{r['audio_hours_per_day']:,.0f}",
                r["effort"],
                f"{r['compile_seconds']:.0f}",
                r.get("commit", "earlier"),
            ]
        missed = "" if r is None else ", ".join(self.misses(r)) or "all met"
        return "| " + " | ".join([*cells, missed]) + " |"

    def render(self, results: dict[tuple[str, str], dict]) -> str:
        keys = [(stage, topology) for stage in STAGES for topology in self.topologies]
        lines = [
            self.introduction,
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
            *(self.row(*key, results.get(key)) for key in keys),
            "",
            "The commands:",
            "",
            "```sh",
            *(" ".join(["python", *self.command(*key)]) for key in keys),
            "```",
            *(["", self.closing.strip()] if self.closing else []),
        ]
        return "\n".join(lines) + "\n"

    def make(self) -> None:
        """Plans what is not stored, writes the page, and prints a JSON object."""
        results = self.stored()
        for topology in FLAGS.topologies:
            for stage in FLAGS.stages:
                if FLAGS.render or (stage, topology) in results:
                    continue
                result = self.run(stage, topology)
                if result is None:
                    print(f"{stage} {topology}: failed, see above", flush=True)
                    continue
                results[stage, topology] = result
                self.file.write_text(
                    "".join(json.dumps(r) + "\n" for r in results.values()), encoding="utf-8"
                )
                missed = ", ".join(self.misses(result)) or "all targets met"
                print(f"{stage} {topology}: {missed}", flush=True)
        page = self.render(results)
        (ROOT / f"docs/{self.name}.md").write_text(page, encoding="utf-8")
        print(page)
        missed = {" ".join(key): self.misses(r) for key, r in results.items() if self.misses(r)}
        planned = {"planned": len(results), "of": len(STAGES) * len(self.topologies)}
        print(json.dumps(planned | {"missed": missed}))


def commit() -> str:
    """The short hash of the newest commit that changed the package or the configs."""
    command = ["git", "log", "-1", "--format=%h", "--", "fastslm_jax", "configs/stage*.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def define_flags(topologies: tuple[str, ...]) -> None:
    flags.DEFINE_list("stages", list(STAGES), "Names of configs.")
    flags.DEFINE_list("topologies", list(topologies), "Topologies to plan for.")
    flags.DEFINE_enum(
        "effort", "default", EFFORTS, "Optimization effort of the compiler (see `plan`)."
    )
    flags.DEFINE_bool("render", False, "Only write the page from the stored results.")


def large_gathers(r: dict) -> bool:
    """Whether a gather is larger than a layer's frozen weights and is not the embedding."""
    return any(
        gather["gib"] > 1.001 * r["largest_layer_gib"]
        and abs(gather["gib"] / r["embedding_gib"] - 1) > 0.001
        for gather in r["gathers"]
    )
