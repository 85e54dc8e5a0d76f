"""A server in a thread, on a free port, for tests."""

import contextlib
import io
import threading
import time

import httpx
import numpy as np
import openai
import soundfile
import uvicorn

from fastslm_jax.inference import api
from fastslm_jax.serve.__main__ import bind
from fastslm_jax.serve.app import Server
from fastslm_jax.serve.limits import Limits
from fastslm_jax.serve.worker import Worker

RATE = 16_000


def wav(samples: np.ndarray, kind: str = "wav") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=kind)
    return buffer.getvalue()


class Running:
    """A server that runs, its clients, and a gate: while it is closed, nothing is decoded.

    `close_after` closes it after that number of steps.
    """

    def __init__(self, worker: Worker, port: int):
        self.worker, self.url = worker, f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.gate = threading.Event()
        self.gate.set()
        self.close_after = 0
        step = worker.scheduler.step

        def gated():
            self.gate.wait()
            if self.close_after:
                self.close_after -= 1
                if not self.close_after:
                    self.gate.clear()
            return step()

        worker.scheduler.step = gated

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def metric(self, name: str, **labels: str) -> float:
        wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
        start = f"{name}{{{wanted}}}" if labels else name
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(start)), 0.0)

    def wait_for(self, condition, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            time.sleep(0.02)

    def wait_until_idle(self) -> None:
        self.wait_for(
            lambda: self.metric("fastslm_jobs") == self.metric("fastslm_active_requests") == 0,
            "all slots are free",
        )


@contextlib.contextmanager
def running(loaded: api.Model, limits: Limits = Limits(), api_key: str | None = None):
    listener = bind("127.0.0.1", 0)
    worker = Worker(loaded, batch_size=4)
    worker.start()
    server = uvicorn.Server(
        uvicorn.Config(
            Server(worker, "tiny", limits, api_key).app(), log_level="warning", access_log=False
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    found = Running(worker, listener.getsockname()[1])
    try:
        yield found
    finally:
        found.gate.set()
        found.http.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not worker.is_alive()
