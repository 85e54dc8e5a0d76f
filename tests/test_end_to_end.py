"""The commands end to end: corpus, three stages with a kill, evaluation, transcription."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fast_compilation
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Compilation dominates the time of a few steps.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast_compilation.FLAGS}
STEPS = {1: 6, 2: 3, 3: 4}
COMMON = [
    "--config.checkpoint_every=2",
    "--config.log_every=1",
    "--config.eval_every=100",
    "--config.data.dev_utterances=4",
]


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        **options,
    )


def train(out, stage, *flags):
    config = [
        f"--config=configs/demo.py:{stage},{out}",
        f"--workdir={out}/stage{stage}",
        f"--config.steps={STEPS[stage]}",
    ]
    return ["train.py", *config, *COMMON, *flags]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    counts = "utterances=80 train_ast=12 train_ssum=12 train_sqqa=12 dev=4 test_asr=4 test_ast=2"
    counts += " test_ssum=2 test_sqqa=2 test_unseen_voices=2 test_long=1"
    done = command(
        "-m",
        "fastslm_jax.demo.corpus",
        f"--out={out}/corpus",
        *(f"--{count}" for count in counts.split()),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_three_stages_with_a_kill_then_eval_and_transcribe(out):
    # Stage 1 uninterrupted, and again with a kill: the same losses.
    done = command(*train(out, 1))
    assert done.returncode == 0, done.stderr
    uninterrupted = losses(out / "stage1")
    assert sorted(uninterrupted) == list(range(1, STEPS[1] + 1))
    again = [argument.replace(f"{out}/stage1", f"{out}/killed") for argument in train(out, 1)]
    killed = subprocess.Popen(
        [sys.executable, *again], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 300
    while not list((out / "killed/checkpoints").glob("[0-9]")) and time.time() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert command(*again).returncode == 0
    assert losses(out / "killed") == uninterrupted

    # Stages 2 and 3 start from the stage before.
    for stage in (2, 3):
        done = command(*train(out, stage))
        assert done.returncode == 0, done.stderr
        assert f"starting from {out}/stage{stage - 1}" in done.stderr

    done = command(
        "eval.py",
        f"--config=configs/demo.py:3,{out}",
        f"--workdir={out}/stage3",
        "--limit=2",
        "--swap_audio=test",
    )
    assert done.returncode == 0, done.stderr
    predictions = [
        json.loads(line)
        for line in (out / "stage3/eval/test_long/asr/predictions.jsonl").read_text().splitlines()
    ]
    # A barely trained model gets into repetition loops: the span is decoded again in pieces, which
    # take a window or two more.
    assert predictions[0]["windows"] >= -(-int(100 * predictions[0]["seconds"]) // 600)
    assert predictions[0]["covered_seconds"] == pytest.approx(predictions[0]["seconds"], abs=0.01)
    assert predictions[0]["speech_tokens"] == 10 * predictions[0]["windows"]
    for label in ("asr", "asr-swapped"):
        assert {"wer", "cer", "utterances"} <= json.loads(
            (out / f"stage3/eval/test/{label}/metrics.json").read_text()
        ).keys()

    file = next((out / "corpus").rglob("*.flac"))
    done = command(
        "-m", "fastslm_jax.transcribe", file, f"--checkpoint={out}/stage3", "--format=json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["file"] == str(file)
    assert record["covered_seconds"] == record["seconds"]
    assert record["stop_reason"] in ("eos", "budget", "loop")
    assert [(s["start"], s["end"], s["text"]) for s in record["segments"]] == [
        (0.0, record["seconds"], record["text"])
    ]


BAD_INPUT = {
    "missing audio": (
        ["-m", "fastslm_jax.transcribe", "none.wav", "--checkpoint=x"],
        "none.wav: no such audio file",
    ),
    "unknown config field": (
        ["train.py", "--config=configs/demo.py:1", "--workdir={tmp}/w", "--config.stepz=3"],
        "stepz",
    ),
    "indivisible batch": (
        [
            "train.py",
            "--config=configs/demo.py:1",
            "--workdir={tmp}/w",
            "--config.global_batch_size=3",
            "--config.accumulate=2",
        ],
        "global_batch_size=3",
    ),
    "missing checkpoint": (
        ["eval.py", "--config=configs/demo.py:3,{out}", "--workdir={tmp}/none"],
        "no checkpoints; train there first",
    ),
    "negative span": (
        ["eval.py", "--config=configs/demo.py:3,{out}", "--workdir={tmp}/none", "--span=-5"],
        "--span=-5: use auto, none, or a number of seconds",
    ),
    "broken audio": (
        ["-m", "fastslm_jax.transcribe", "{tmp}/broken.wav", "--checkpoint={tmp}/none"],
        "not readable as audio",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(name, out, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF0000WAVEjunk")
    arguments, expected = BAD_INPUT[name]
    done = command(*(argument.format(out=out, tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in done.stderr
