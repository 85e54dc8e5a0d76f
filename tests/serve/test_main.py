"""The serve command: it refuses bad flags before it loads the model, and ends gently."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest
from absl import flags
from running_server import wav

from fastslm_jax.errors import UserError
from fastslm_jax.inference import api
from fastslm_jax.serve import __main__ as command

ROOT = pathlib.Path(__file__).parents[2]


def run(*given, argv=()):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["serve", "--checkpoint=none", "--port=0", *given])
    command.main(["serve", *argv], values)


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def never(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(api, "load", never)


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}: Address already in use; use another"):
            run(f"--port={port}")


@pytest.mark.parametrize("host", ["256.1.1.1", "no such host", "8.8.8.8"])
def test_an_address_that_is_not_here(host):
    with pytest.raises(UserError, match=f"--host={host}"):
        run(f"--host={host}")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("", "one key"), ("a b", "one key")]
)
def test_bad_key_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(UserError, match=message):
        run(f"--api_key_file={tmp_path}/key")


def test_a_key_file(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    assert command.read_key(str(tmp_path / "key")) == "secret"
    assert command.read_key(None) is None


def test_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs uvicorn: pip install 'fastslm-jax\[serve\]'"):
        run()


def test_arguments_that_are_no_flags():
    with pytest.raises(UserError, match=r"unexpected argument 'a\.wav'"):
        run(argv=["a.wav"])


def test_a_missing_checkpoint(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"{tmp_path}/none: "):
        run(f"--checkpoint={tmp_path}/none")


def test_sigterm_finishes_what_runs_and_exits_with_0():
    arguments = [sys.executable, "-m", "fastslm_jax.serve", "--checkpoint=assets/demo_model"]
    one_device = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    with subprocess.Popen(
        [*arguments, "--port=0"],
        cwd=ROOT,
        env=os.environ | one_device,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            url = process.stdout.readline().split()[-1]
            noise = np.random.default_rng(0).normal(0, 3000, 120 * 16_000).astype(np.int16)
            with (
                httpx.Client(base_url=url, timeout=120) as client,
                concurrent.futures.ThreadPoolExecutor(1) as pool,
            ):
                running = pool.submit(
                    client.post,
                    "/v1/audio/transcriptions",
                    files={"file": ("a.flac", wav(noise, "flac"))},
                    data={"model": "demo_model", "response_format": "verbose_json"},
                )
                while "fastslm_active_requests 1.0" not in httpx.get(url + "/metrics").text:
                    assert not running.done()
                process.send_signal(signal.SIGTERM)
                response = running.result()
            assert response.status_code == 200
            assert response.json()["segments"][-1]["end"] == 120.0
            assert process.wait(60) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/health")
        finally:
            process.kill()
