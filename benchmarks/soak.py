"""Kills real runs at random points and checks that no work is lost, repeated or changed.

    python benchmarks/soak.py train  [--kills=20] [--processes=1] [--seed=0]
    python benchmarks/soak.py ingest [--kills=3] [--clips=20000] [--workers=2] [--seed=0]
    python benchmarks/soak.py demo   [--full] [--seed=0]

Every target runs once undisturbed. A second run is killed and restarted with the same command until
it completes, and its results are compared with those of the first.

train   A tiny experiment: 24 steps, a checkpoint every 2. SIGKILL and SIGTERM alternate. Every
        third kill waits for a checkpoint write; some of the others hit start-up or restore. With
        --processes=2, two processes of two devices each train together, and one of them is killed.
        JSON: steps_lost (steps without a logged loss), steps_repeated (steps logged twice),
        max_loss_difference (0: bitwise equal), redone_steps (steps run again because they came
        after the last checkpoint).
ingest  An import of clips of 1 to 2 s of noise, one in 500 of them silent, killed with SIGKILL.
        JSON: equal, true if both imports wrote the same files.
demo    `make demo`, killed with SIGKILL once in every phase: a reduced demo of a few steps (about 9
        minutes on two CPU cores), or with --full the real one, twice.
        JSON: equal, true if both reports agree except for time and memory; kills, the phases hit.

The last line is one JSON object. Exit code 1: the results differ.
"""

import argparse
import atexit
import hashlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import soundfile
from banner import print_banner

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 24  # of the train target
SHARD_CLIPS = 128  # of the ingest target
PHASES = ("corpus", "stage1", "stage2", "stage3", "eval")  # of the demo
NOT_COMPARED = ("minutes", "peak_rss_gib")  # fields of the demo's report
SMALL_DEMO = [
    "--train_flags=--config.steps=8,--config.checkpoint_every=2,--config.log_every=1,"
    "--config.eval_every=4,--config.data.dev_utterances=4",
    "--corpus_flags=--utterances=120,--train_ast=20,--train_ssum=20,--train_sqqa=20,--dev=4,"
    "--test_asr=4,--test_ast=4,--test_ssum=4,--test_sqqa=4,--test_unseen_voices=4,--test_long=1",
]


class Run:
    """The processes of one command. Their output is appended to `log`."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        log: pathlib.Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        with open(log, "ab") as stream:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=os.environ | (environment or {}),
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
                for command in commands
            ]
        atexit.register(self.kill)

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait_for(self, condition: Callable[[], bool], interval: float = 0.002) -> None:
        """Returns when the condition is true or any process has ended."""
        while all(process.poll() is None for process in self.processes) and not condition():
            time.sleep(interval)

    def wait_seconds(self, seconds: float) -> None:
        deadline = time.time() + seconds
        self.wait_for(lambda: time.time() >= deadline)

    def kill(self) -> None:
        """Sends SIGKILL to every process and its children."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def finish(self) -> None:
        """Waits for all processes, and exits if one of them fails."""
        codes = [process.wait() for process in self.processes]
        if any(codes):
            output = self.log.read_text(errors="replace")[-2000:]
            sys.exit(f"a run ended with exit codes {codes}:\n{output}")


# -------------------------------------------------------------------------------------------- train


def start_train(experiment: pathlib.Path, workdir: pathlib.Path, processes: int) -> Run:
    environment = {
        "FASTSLM_COMPILATION_CACHE": str(experiment / "cache"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = ["train.py", f"--config={experiment}/config.py", f"--workdir={workdir}"]
    command += [f"--config.steps={STEPS}"]
    commands = [command]
    if processes > 1:
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command.append(f"--coordinator=localhost:{free.getsockname()[1]}")
        command += [f"--num_processes={processes}", "--config.mesh.fsdp=2"]
        command += [f"--config.global_batch_size={2 * processes}"]
        commands = [[*command, f"--process_id={number}"] for number in range(processes)]
    return Run(commands, workdir.with_suffix(".log"), environment)


def logged_losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """(step, loss) of every line in metrics.jsonl."""
    file, found = workdir / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # truncated by a kill; the next run removes it
            break
        if "loss" in entry:
            found.append((entry["step"], entry["loss"]))
    return found


def kill_train(run: Run, workdir: pathlib.Path, number: int, rng: random.Random) -> str | None:
    """Kills a training run. Returns how, or None if the run ended first."""
    during_save = number % 3 == 2
    at_start = number % 4 == 0 and not during_save
    if not at_start:  # so that each of these attempts makes progress
        before = len(logged_losses(workdir))
        run.wait_for(lambda: len(logged_losses(workdir)) > before)
    if during_save:
        run.wait_for(lambda: any((workdir / "checkpoints").glob("*tmp*")), interval=0.001)
    else:
        run.wait_seconds(rng.uniform(0, 15 if at_start else 1))
    if not run.is_running():
        return None
    name = "SIGTERM" if number % 2 else "SIGKILL"
    rng.choice(run.processes).send_signal(getattr(signal, name))
    if name == "SIGTERM":
        run.finish()  # SIGTERM to one process makes all of them save and exit with 0
    else:
        run.kill()  # the others wait for the killed one; a scheduler would end them
    place = "during a save" if during_save else "at start-up" if at_start else "between steps"
    return f"{name} {place}"


def soak_train(options: argparse.Namespace, scratch: pathlib.Path) -> tuple[dict, bool]:
    import tiny_experiment

    experiment, rng = scratch / "experiment", random.Random(options.seed)
    tiny_experiment.write(experiment)
    start_train(experiment, scratch / "undisturbed", options.processes).finish()
    expected = dict(logged_losses(scratch / "undisturbed"))
    print(f"undisturbed run: {len(expected)} steps", flush=True)

    workdirs, kills, redone = [scratch / "killed0"], 0, 0
    while kills < options.kills:
        workdir = workdirs[-1]
        run = start_train(experiment, workdir, options.processes)
        done = kill_train(run, workdir, kills, rng)
        if done is None:  # the run completed; the remaining kills go to a new one
            run.finish()
            workdirs.append(scratch / f"killed{len(workdirs)}")
            continue
        kills += 1
        last = max((step for step, _ in logged_losses(workdir)), default=0)
        names = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
        saved = max((int(name) for name in names if name.isdigit()), default=0)
        redone += last - saved
        print(f"kill {kills:2}: {done}, last step {last}, last checkpoint {saved}", flush=True)
    start_train(experiment, workdirs[-1], options.processes).finish()

    runs = [logged_losses(workdir) for workdir in workdirs]
    report = {
        "kills": kills,
        "processes": options.processes,
        "steps_lost": sum(len(expected.keys() - dict(run).keys()) for run in runs),
        "steps_repeated": sum(len(run) - len(dict(run)) for run in runs),
        "max_loss_difference": max(
            abs(dict(run).get(step, float("inf")) - loss)
            for run in runs
            for step, loss in expected.items()
        ),
        "redone_steps": redone,
    }
    differing = ("steps_lost", "steps_repeated", "max_loss_difference")
    return report, not any(report[name] for name in differing)


# ------------------------------------------------------------------------------------------- ingest


def write_corpus(folder: pathlib.Path, clips: int) -> None:
    rng, lines = np.random.default_rng(0), []
    noise = rng.normal(0, 0.1, 48_000)
    for number in range(clips):
        if number % 1000 == 0:
            (folder / f"{number // 1000}").mkdir(parents=True)
        start, length = rng.integers(0, 16_000), rng.integers(16_000, 32_000)
        samples = np.zeros(length) if number % 500 == 7 else noise[start : start + length]
        name = f"{number // 1000}/{number}.flac"
        soundfile.write(folder / name, samples, 16_000)
        line = {
            "audio_filepath": name,
            "duration": length / 16_000,
            "text": f"clip number {number}",
            "id": f"c{number}",
        }
        lines.append(json.dumps(line) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def start_ingest(corpus: pathlib.Path, out: pathlib.Path, workers: int) -> Run:
    command = ["-m", "fastslm_jax.data.ingest", f"jsonl:{corpus}/train.jsonl", f"--out={out}"]
    command += [f"--shard_clips={SHARD_CLIPS}", f"--workers={workers}"]
    return Run([command], out.with_suffix(".log"))


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def soak_ingest(options: argparse.Namespace, scratch: pathlib.Path) -> tuple[dict, bool]:
    corpus, killed, undisturbed = (scratch / name for name in ("corpus", "killed", "undisturbed"))
    write_corpus(corpus, options.clips)
    print(f"{options.clips} clips written", flush=True)
    started = time.time()
    start_ingest(corpus, undisturbed, options.workers).finish()
    seconds, shards = time.time() - started, -(-options.clips // SHARD_CLIPS)
    print(f"undisturbed import: {shards} shards in {seconds:.1f} s", flush=True)

    def shards_done() -> int:
        return len(list((killed / "parts").glob("*.json")))

    rng, done_at_kill = random.Random(options.seed), []
    for number in range(options.kills):
        run = start_ingest(corpus, killed, options.workers)
        # The kills are spread over the import, and each attempt completes at least one shard.
        share = (number + rng.random()) / (options.kills + 1)
        goal = max(shards_done() + 1, round(shards * share))
        run.wait_for(lambda goal=goal: shards_done() >= goal, interval=0.01)
        run.wait_seconds(rng.uniform(0, 0.3))
        if not run.is_running():
            sys.exit("the import ended before it was killed: raise --clips")
        run.processes[0].kill()  # only the main process: its workers must notice and exit
        run.processes[0].wait()
        done_at_kill.append(shards_done())
        print(f"kill {number + 1}: {done_at_kill[-1]} of {shards} shards done", flush=True)
        time.sleep(1)
    start_ingest(corpus, killed, options.workers).finish()
    equal = digests(killed) == digests(undisturbed)
    report = {
        "clips": options.clips,
        "kills": options.kills,
        "shards_done_at_kill": done_at_kill,
        "shards": shards,
        "rejected": len((killed / "rejected.jsonl").read_text(encoding="utf-8").splitlines()),
        "seconds_undisturbed": round(seconds, 1),
        "equal": equal,
    }
    return report, equal


# --------------------------------------------------------------------------------------------- demo


def start_demo(out: pathlib.Path, flags: Sequence[str]) -> Run:
    command = ["-m", "fastslm_jax.demo", f"--out={out}", *flags]
    return Run([command], out.with_suffix(".log"))


def compared_report(out: pathlib.Path) -> dict:
    """The demo's report without time and memory."""

    def compared(fields: dict) -> dict:
        return {name: value for name, value in fields.items() if name not in NOT_COMPARED}

    report = compared(json.loads((out / "report.json").read_text(encoding="utf-8")))
    return report | {"stages": [compared(stage) for stage in report["stages"]]}


def has_begun(out: pathlib.Path, phase: str) -> bool:
    """Whether a phase has started; for a training stage, whether it has a checkpoint to resume."""
    if phase.startswith("stage"):
        return any((out / phase / "checkpoints").glob("[0-9]*"))
    file = out / "phases.json"
    return file.exists() and phase in json.loads(file.read_text(encoding="utf-8"))


def soak_demo(options: argparse.Namespace, scratch: pathlib.Path) -> tuple[dict, bool]:
    flags, rng = [] if options.full else SMALL_DEMO, random.Random(options.seed)
    undisturbed, killed = scratch / "undisturbed", scratch / "killed"
    start_demo(undisturbed, flags).finish()
    print("undisturbed demo: done", flush=True)
    kills = 0
    for phase in PHASES:
        run = start_demo(killed, flags)
        run.wait_for(lambda phase=phase: has_begun(killed, phase), interval=0.02)
        run.wait_seconds(rng.uniform(0, 2))
        if run.is_running():
            run.kill()
            kills += 1
            print(f"kill {kills}: in {phase}", flush=True)
        else:
            run.finish()
    start_demo(killed, flags).finish()
    before, after = compared_report(undisturbed), compared_report(killed)
    equal = before == after
    report = {"kills": kills, "equal": equal, "undisturbed": before, "killed": after}
    return report, equal and kills == len(PHASES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    targets = parser.add_subparsers(dest="target", required=True)
    train = targets.add_parser("train", parents=[common], help="a tiny training run")
    train.add_argument("--kills", type=int, default=20)
    train.add_argument("--processes", type=int, default=1, help="processes that train together")
    ingest = targets.add_parser("ingest", parents=[common], help="the import of a corpus")
    ingest.add_argument("--kills", type=int, default=3)
    ingest.add_argument("--clips", type=int, default=20_000)
    ingest.add_argument("--workers", type=int, default=2, help="workers of the import")
    demo = targets.add_parser("demo", parents=[common], help="the demo, in every phase")
    demo.add_argument("--full", action="store_true", help="the real demo, not a reduced one")
    options = parser.parse_args()
    soak = {"train": soak_train, "ingest": soak_ingest, "demo": soak_demo}[options.target]
    print_banner(f"Soak test of {options.target}: killed and restarted against undisturbed.")
    with tempfile.TemporaryDirectory(prefix="soak.", ignore_cleanup_errors=True) as scratch:
        report, passed = soak(options, pathlib.Path(scratch))
    print(json.dumps(report))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
