"""train.py on two processes: dev evaluation, SIGTERM to one, resuming with one, disagreement."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import fast_compilation
import pytest
import tiny_experiment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).parents[1]
CHANGES = {
    "mesh.fsdp": 2,
    "mesh.data": 2,
    "global_batch_size": 4,
    "steps": 8,
    "eval_every": 4,
    "data.dev_utterances": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    tiny_experiment.write(folder)
    return folder


def start(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    processes: int,
    *options: str,
    folders: Sequence[pathlib.Path] = (ROOT, ROOT),
) -> list[subprocess.Popen]:
    """Starts a run on four virtual devices in total.

    Args:
        folders: where each process is started.
    """
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes} "
        + fast_compilation.FLAGS,
        "FASTSLM_COMPILATION_CACHE": str(folder / "cache"),
    }
    command = [
        sys.executable,
        f"{ROOT}/train.py",
        f"--config={folder}/config.py",
        f"--workdir={workdir}",
    ]
    command += [
        f"--config.data.dev={folder}/train.jsonl",
        *(f"--config.{field}={value}" for field, value in CHANGES.items()),
        *options,
    ]
    extra = [[]]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
        extra = [[*shared, f"--process_id={number}"] for number in range(processes)]
    with open(f"{workdir}.log", "ab") as log:
        return [
            subprocess.Popen([*command, *flags], cwd=cwd, env=environment, stderr=log, stdout=log)
            for flags, cwd in zip(extra, folders, strict=False)
        ]


def finish(processes: list[subprocess.Popen], workdir: pathlib.Path, code: int = 0) -> None:
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [code] * len(codes), pathlib.Path(f"{workdir}.log").read_text()[-3000:]


def lines(workdir: pathlib.Path, field: str) -> dict[int, float]:
    """{step: value} of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    # The last line may be incomplete.
    complete = file.read_text().rpartition("\n")[0] if file.exists() else ""
    found = [json.loads(line) for line in complete.splitlines()]
    return {line["step"]: line[field] for line in found if field in line}


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(folder, tmp_path):
    reference, stopped = tmp_path / "reference", tmp_path / "stopped"
    finish(start(folder, reference, processes=1), reference)

    processes = start(folder, stopped, processes=2)
    deadline = time.time() + 240
    while (
        4 not in lines(stopped, "dev/wer")
        and time.time() < deadline
        and all(p.poll() is None for p in processes)
    ):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # a scheduler may signal only one
    finish(processes, stopped)
    done = max(lines(stopped, "loss"))
    assert 4 <= done < CHANGES["steps"]
    finish(start(folder, stopped, processes=1), stopped)

    losses, expected = lines(stopped, "loss"), lines(reference, "loss")
    assert list(losses) == list(expected) == list(range(1, CHANGES["steps"] + 1))
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    scores, expected = lines(stopped, "dev/wer"), lines(reference, "dev/wer")
    assert scores == expected
    assert set(scores) == {4, 8}

    events = EventAccumulator(str(reference)).Reload()
    shown = {"loss", "learning_rate", "audio_seconds_per_second", "dev/wer", "dev/asr"}
    assert shown <= set(events.Tags()["tensors"])
    assert [event.step for event in events.Tensors("dev/wer")] == [4, 8]
    assert b"hypothesis: " in events.Tensors("dev/asr")[0].tensor_proto.string_val[0]


def test_processes_with_other_data_stop_before_the_first_step(folder, tmp_path):
    """The data is a local folder, and one process has an older copy."""
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("cache"))
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b/train.jsonl").write_text("".join(lines[:-1]))
    workdir = tmp_path / "run"
    options = ("--config.data.train.noise.path=train.jsonl", "--config.data.dev=")
    folders = (tmp_path / "a", tmp_path / "b")
    finish(start(folder, workdir, 2, *options, folders=folders), workdir, code=2)
    found = pathlib.Path(f"{workdir}.log").read_text()
    errors = re.findall("^error: .*", found, flags=re.MULTILINE)
    assert len(errors) == 2
    assert errors[0] == errors[1]
    assert re.fullmatch(
        r"error: process 1 differs from process 0: the manifest of config\.data\.train\.noise is "
        r'"\w+" and not "\w+", the order of rows is "\w+" and not "\w+"; start every process with '
        "the same command, code and data",
        errors[0],
    )
    assert "Traceback" not in found
    assert not (workdir / "checkpoints").exists() or not list((workdir / "checkpoints").iterdir())
