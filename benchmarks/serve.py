"""Many clients at once against one at a time: answers, latency, throughput, memory of the server.

    python benchmarks/serve.py [--checkpoint=assets/demo_model] [--requests=200]
        [--concurrency=16] [--soak=1000]

Starts `python -m fastslm_jax.serve` and sends it a mix of requests: short and long recordings in
all tasks and forms, as JSON and as streams, broken files, files that are too large, and clients
that leave half-way. Every answer must equal the one that the same request gets alone. Then it goes
on for `soak` requests and compares the server's memory before and after. Last line: one JSON
object; exit code 1 if an answer was lost or mixed up, or if memory grew by more than 5 %.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

import httpx
import numpy as np
from absl import flags
from banner import print_banner

from fastslm_jax import cli
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.demo.corpus import DEFAULT_COUNTS, build_corpus

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", "assets/demo_model", "Working directory of the model.")
flags.DEFINE_integer("requests", 200, "Requests of the mix.")
flags.DEFINE_integer("concurrency", 16, "Clients at the same time.")
flags.DEFINE_integer("soak", 1000, "Further requests, after which memory is compared.")

MAX_MEGABYTES = 8
MAX_GROWTH = 0.05
KINDS = {  # share of the mix
    "short": 0.50,
    "stream": 0.10,
    "long": 0.10,
    "chat": 0.05,
    "broken": 0.10,
    "large": 0.05,
    "cancelled": 0.10,
}
STATUS = {"broken": 400, "large": 413}  # others: 200


@dataclasses.dataclass(frozen=True)
class Call:
    """A request of the mix, and the seconds of its audio."""

    kind: str
    path: str
    seconds: float
    task: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back; `text` is the whole body of an error."""

    status: int
    text: str
    seconds: float


def mix(folder: str, count: int) -> list[Call]:
    """A shuffled list of calls, the same each time."""
    rng = np.random.default_rng(0)
    short = [
        u
        for name in ("test", "test_unseen_voices")
        for u in read_manifest(f"{folder}/{name}.jsonl")
    ]
    long = read_manifest(f"{folder}/test_long.jsonl")
    calls = []
    for kind, share in KINDS.items():
        for i in range(round(share * count)):
            utterances = long if kind in ("long", "cancelled") else short
            utterance = utterances[i % len(utterances)]
            calls.append(Call(kind, utterance.path, utterance.seconds, utterance.task))
    return [calls[i] for i in rng.permutation(len(calls))]


def send(client: httpx.Client, call: Call) -> Reply:
    """Sends a call and reads its reply; a cancelled one is left after three events."""
    began = time.monotonic()
    data = pathlib.Path(call.path).read_bytes()
    if call.kind == "broken":
        data = data[:20] + bytes(2000)
    elif call.kind == "large":
        data = bytes((MAX_MEGABYTES << 20) + 1000)
    fields = {"task": call.task}
    files = {"file": (pathlib.Path(call.path).name, data)}
    url = "/v1/audio/transcriptions"
    if call.kind in ("stream", "cancelled"):
        fields |= {"stream": "true", "response_format": "verbose_json"}
        text, events = "", 0
        with client.stream("POST", url, files=files, data=fields) as response:
            for line in response.iter_lines():
                events += line.startswith("data: ")
                if call.kind == "cancelled" and events == 3:
                    break
                if '"transcript.text.done"' in line:
                    text = json.loads(line.removeprefix("data: "))["text"]
        return Reply(response.status_code, text, time.monotonic() - began)
    if call.kind == "chat":
        audio = {"data": base64.b64encode(data).decode(), "format": "flac"}
        content = [{"type": "input_audio", "input_audio": audio}]
        body = {"messages": [{"role": "user", "content": content}], "task": call.task}
        response = client.post("/v1/chat/completions", json=body)
        text = response.json()["choices"][0]["message"]["content"]
    else:
        response = client.post(url, files=files, data=fields)
        text = response.json()["text"] if response.status_code == 200 else response.text
    return Reply(response.status_code, text, time.monotonic() - began)


def send_all(url: str, calls: Sequence[Call], concurrency: int) -> tuple[list[Reply], float]:
    """The replies in the order of the calls, and the seconds that all took."""
    with (
        httpx.Client(base_url=url, timeout=600) as client,
        concurrent.futures.ThreadPoolExecutor(concurrency) as pool,
    ):
        began = time.monotonic()
        replies = list(pool.map(lambda call: send(client, call), calls))
        return replies, time.monotonic() - began


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Runs the server; its URL."""
    arguments = [f"--checkpoint={FLAGS.checkpoint}", "--port=0", f"--max_megabytes={MAX_MEGABYTES}"]
    command = [sys.executable, "-m", "fastslm_jax.serve", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
        assert process.wait(60) == 0, "the server did not exit with 0"


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def check(calls: Sequence[Call], replies: Sequence[Reply], expected: Sequence[Reply]) -> list[str]:
    """The calls whose reply is not that of the same call alone."""
    wrong = []
    for call, reply, alone in zip(calls, replies, expected, strict=True):
        is_right = reply.status == STATUS.get(call.kind, 200) and reply.text == alone.text
        if not is_right:
            wrong.append(f"{call}: {reply} instead of {alone}")
    return wrong


def figures(calls: Sequence[Call], replies: Sequence[Reply], seconds: float) -> dict:
    """Latencies of answered calls, and throughput."""
    answered = [
        (call, reply)
        for call, reply in zip(calls, replies, strict=True)
        if call.kind not in (*STATUS, "cancelled")
    ]
    latencies = [reply.seconds for _, reply in answered]
    short = [reply.seconds for call, reply in answered if call.kind != "long"]
    return {
        "p50_seconds": round(float(np.percentile(latencies, 50)), 3),
        "p95_seconds": round(float(np.percentile(latencies, 95)), 3),
        "p95_seconds_short": round(float(np.percentile(short, 95)), 3),
        "requests_per_second": round(len(calls) / seconds, 2),
        "audio_seconds_per_second": round(sum(call.seconds for call, _ in answered) / seconds, 1),
    }


def main(_: list[str]) -> None:
    print_banner("A server with many clients at once, against one at a time.")
    with tempfile.TemporaryDirectory() as folder, server() as url:
        counts = {name: dict.fromkeys(tasks, 0) for name, tasks in DEFAULT_COUNTS.items()}
        counts["test"] = dict.fromkeys(counts["test"], 10)
        counts["test_unseen_voices"]["asr"], counts["test_long"]["asr"] = 40, 8
        build_corpus(folder, 1, counts, 1)
        calls = mix(folder, FLAGS.requests)
        print({kind: sum(call.kind == kind for call in calls) for kind in KINDS})
        send_all(url, calls, FLAGS.concurrency)  # compiles what the warm-up did not
        alone, alone_seconds = send_all(url, calls, 1)
        together, together_seconds = send_all(url, calls, FLAGS.concurrency)
        wrong = check(calls, together, alone)
        memory = [metrics(url)["process_resident_memory_bytes"]]
        statuses = collections.Counter()
        sent = 0
        while sent < FLAGS.soak:
            replies, _seconds = send_all(url, calls, FLAGS.concurrency)
            wrong += check(calls, replies, alone)
            statuses.update(reply.status for reply in replies)
            sent += len(calls)
            memory.append(metrics(url)["process_resident_memory_bytes"])
        left = metrics(url)
        idle = all(left[name] == 0 for name in ("fastslm_jobs", "fastslm_rows_running"))
    growth = memory[-1] / memory[0] - 1
    one, many = figures(calls, alone, alone_seconds), figures(calls, together, together_seconds)
    print(f"{'':>28} {'one by one':>12} {FLAGS.concurrency:>9} at once")
    for name, value in one.items():
        print(f"{name:>28} {value:>12} {many[name]:>12}")
    print(f"memory, MiB, each {len(calls)} requests: {[round(m / 2**20) for m in memory]}")
    for line in wrong[:10]:
        print(line)
    print(
        json.dumps(
            {
                "requests": len(calls),
                "concurrency": FLAGS.concurrency,
                "one_by_one": one,
                "at_once": many,
                "soak_requests": sent,
                "soak_statuses": dict(statuses),
                "wrong": len(wrong),
                "memory_growth": round(growth, 4),
                "slots_left": 0 if idle else left["fastslm_jobs"],
            }
        )
    )
    if wrong or not idle or abs(growth) > MAX_GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    cli.run(main)
