"""Kills an import with SIGKILL at random instants and compares what it ends in with an undisturbed import.

    python benchmarks/ingest_kill.py [--clips=20000] [--kills=3] [--workers=2]

Clips are 1 … 2 s of noise, one in five hundred of them unusable. Last line: one JSON object; `equal` must be true.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile

ROOT = pathlib.Path(__file__).parents[1]


def write_corpus(folder: pathlib.Path, clips: int) -> None:
    rng, lines = np.random.default_rng(0), []
    noise = rng.normal(0, 0.1, 48_000)
    for number in range(clips):
        if number % 1000 == 0:
            (folder / f"{number // 1000}").mkdir()
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
    (folder / "train.jsonl").write_text("".join(lines))


def start(corpus: pathlib.Path, out: pathlib.Path, workers: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "fastslm_jax.data.ingest",
        f"jsonl:{corpus}/train.jsonl",
        f"--out={out}",
        "--shard_clips=128",
    ]
    return subprocess.Popen(
        [*command, f"--workers={workers}"],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rng, instants = random.Random(0), []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        corpus, killed, undisturbed = folder / "corpus", folder / "killed", folder / "undisturbed"
        corpus.mkdir()
        write_corpus(corpus, options.clips)
        print(f"{options.clips} clips written", flush=True)
        started = time.time()
        if start(corpus, undisturbed, options.workers).wait():
            sys.exit("the undisturbed import failed")
        seconds, shards = time.time() - started, -(-options.clips // 128)
        for kill in range(options.kills):
            process = start(corpus, killed, options.workers)
            # At a random instant after the first shard that this run made, in its share of the whole.
            before = len(list((killed / "parts").glob("*.json")))
            goal = max(before + 1, round(shards * (kill + rng.random()) / (options.kills + 1)))
            while process.poll() is None and len(list((killed / "parts").glob("*.json"))) < goal:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            if process.poll() is not None:
                sys.exit("the import ended before it was killed; take more clips")
            os.kill(process.pid, signal.SIGKILL)  # its workers see to themselves
            process.wait()
            instants.append(len(list((killed / "parts").glob("*.json"))))
            print(f"killed with {instants[-1]} of {shards} shards done", flush=True)
            time.sleep(1)
        if start(corpus, killed, options.workers).wait():
            sys.exit("the import failed after it was killed")
        equal = digests(killed) == digests(undisturbed)
        rejected = len((killed / "rejected.jsonl").read_text().splitlines())
    result = {
        "clips": options.clips,
        "kills": options.kills,
        "shards_done_at_kill": instants,
        "shards": shards,
    }
    print(
        json.dumps(
            result
            | {"rejected": rejected, "seconds_undisturbed": round(seconds, 1), "equal": equal}
        )
    )
    sys.exit(not equal)


if __name__ == "__main__":
    main()
