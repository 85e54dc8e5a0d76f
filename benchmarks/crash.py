"""Kills a training run at random instants and compares every step's loss with an undisturbed run's.

    python benchmarks/crash.py [--kills=20] [--processes=1]

A tiny experiment of 24 steps, a checkpoint every second step. SIGKILL and SIGTERM take turns; every third kill waits until a
checkpoint is being written, every fourth may come before the first step, while the run starts or resumes. The run is started
again after each, and at the end once more until it is done. With --processes=2, two processes of two devices train together
and one of them is killed.
Last line: one JSON object. steps_lost counts steps without a loss in metrics.jsonl, steps_repeated those with two, and
max_loss_difference must be 0: the same bits. redone_steps is what the kills cost: steps run again, since they came after the
last checkpoint.
"""

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

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tiny_experiment
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = flags.FLAGS
flags.DEFINE_integer("kills", 20, "How often.")
flags.DEFINE_integer("processes", 1, "Processes that train together.")
flags.DEFINE_integer("seed", 0, "Of the instants.")
STEPS = 24


def start(folder: pathlib.Path, workdir: pathlib.Path) -> list[subprocess.Popen]:
    """The processes of a run; what they say goes to workdir.log."""
    environment = os.environ | {
        "FASTSLM_COMPILATION_CACHE": str(folder / "cache"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [
        sys.executable,
        "train.py",
        f"--config={folder}/config.py",
        f"--workdir={workdir}",
        f"--config.steps={STEPS}",
    ]
    extra = [[]]
    if FLAGS.processes > 1:
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = [
            f"--coordinator=localhost:{port}",
            f"--num_processes={FLAGS.processes}",
            "--config.mesh.fsdp=2",
        ]
        shared += [f"--config.global_batch_size={2 * FLAGS.processes}"]
        extra = [[*shared, f"--process_id={number}"] for number in range(FLAGS.processes)]
    with open(f"{workdir}.log", "ab") as log:
        return [
            subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, stderr=log, stdout=log)
            for flags in extra
        ]


def finish(processes: list[subprocess.Popen], workdir: pathlib.Path) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a run failed: {pathlib.Path(f'{workdir}.log').read_text()[-2000:]}")


def lines(workdir: pathlib.Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # cut by a kill; the next run drops it
            break
    return [line for line in found if "loss" in line]


def is_saving(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


def kill(
    processes: list[subprocess.Popen], workdir: pathlib.Path, number: int, rng: random.Random
) -> str | None:
    """Waits for an instant and kills there. Returns what was done; None if the run was over before."""
    begun, in_save, at_start = (
        len(lines(workdir)),
        number % 3 == 2,
        number % 4 == 0 and number % 3 != 2,
    )
    while (
        not at_start
        and len(lines(workdir)) <= begun
        and all(process.poll() is None for process in processes)
    ):
        time.sleep(0.002)  # these attempts get one step on at least
    deadline = time.time() + rng.uniform(0, 15.0 if at_start else 1.0)
    while (not is_saving(workdir) if in_save else time.time() < deadline) and all(
        p.poll() is None for p in processes
    ):
        time.sleep(0.001)
    if all(process.poll() is not None for process in processes):
        return None
    name = "SIGTERM" if number % 2 else "SIGKILL"
    target = rng.choice(processes)
    target.send_signal(getattr(signal, name))
    if name == "SIGKILL":
        for process in processes:  # the others wait for it in vain: a scheduler ends them
            process.kill()
    codes = [process.wait() for process in processes]
    if name == "SIGTERM" and any(codes):
        sys.exit(
            f"SIGTERM ended a run with {codes}: {pathlib.Path(f'{workdir}.log').read_text()[-2000:]}"
        )
    return f"{name} {'during a save' if in_save else 'at the start' if at_start else 'at any time'}"


def main(_):
    rng = random.Random(FLAGS.seed)
    with tempfile.TemporaryDirectory(prefix="crash.") as scratch:
        folder = pathlib.Path(scratch)
        tiny_experiment.write(folder / "experiment")
        undisturbed, killed = folder / "undisturbed", folder / "killed"
        finish(start(folder / "experiment", undisturbed), undisturbed)
        expected = tiny_experiment.losses(undisturbed)

        kills = redone = 0
        while kills < FLAGS.kills:
            processes = start(folder / "experiment", killed)
            done = kill(processes, killed, kills, rng)
            if done is None:  # the run came to its end: a new one takes the rest of the kills
                finish(processes, killed)
                compare(killed, expected)
                killed = folder / f"killed{kills}"
                continue
            kills += 1
            steps = [line["step"] for line in lines(killed)]
            saved = [
                int(path.name)
                for path in (killed / "checkpoints").glob("[0-9]*")
                if path.name.isdigit()
            ]
            redone += max(steps, default=0) - max(saved, default=0)
            print(
                f"kill {kills:2}: {done} after step {max(steps, default=0)}, saved step {max(saved, default=0)}",
                flush=True,
            )
        finish(start(folder / "experiment", killed), killed)
        report = (
            {"kills": kills, "processes": FLAGS.processes}
            | compare(killed, expected)
            | {"redone_steps": redone}
        )
    print(json.dumps(report))
    sys.exit(
        bool(report["steps_lost"] or report["steps_repeated"] or report["max_loss_difference"])
    )


def compare(workdir: pathlib.Path, expected: dict[int, float]) -> dict:
    steps, losses = [line["step"] for line in lines(workdir)], tiny_experiment.losses(workdir)
    report = {
        "steps_lost": len(set(expected) - set(steps)),
        "steps_repeated": len(steps) - len(set(steps)),
        "max_loss_difference": max(
            abs(losses.get(step, float("inf")) - loss) for step, loss in expected.items()
        ),
    }
    if any(report.values()):
        print(json.dumps(report))
        sys.exit("the killed run is not the undisturbed one")
    return report


if __name__ == "__main__":
    app.run(main)
