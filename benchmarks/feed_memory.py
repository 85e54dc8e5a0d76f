"""Memory growth of the input pipeline: resident size after 200 and after 2000 batches.

    python benchmarks/feed_memory.py [--batches=2000] [--workers=0]

Measures this process and its workers (Linux). A batch is two rows of 16 windows of 6 s, from an
imported folder of 400 clips over many epochs; half of the examples are joined clips. Target: growth
below 0.05. Last line: one JSON object.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import soundfile
from absl import flags
from banner import print_banner

from fastslm_jax import audio
from fastslm_jax.data import loader, prompts
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.packing import RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows

TOKENIZER = pathlib.Path(__file__).parents[1] / "assets/demo_llm"
CLIPS = 400


def resident_mib() -> float:
    """Resident size of this process and all its descendants (Linux)."""
    pids = [os.getpid()]
    for pid in pids:  # grows during the loop
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text(encoding="utf-8").split())
    pages = sum(
        int(pathlib.Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        for pid in pids
    )
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_corpus(folder: pathlib.Path) -> str:
    """Clips of noise, imported. Returns the path of the imported folder."""
    rng, lines = np.random.default_rng(0), []
    (folder / "wav").mkdir()
    for number in range(CLIPS):
        seconds = rng.uniform(1, 6)
        samples = rng.normal(0, 0.1, round(16_000 * seconds))
        name = f"wav/{number}.wav"
        soundfile.write(folder / name, samples, 16_000)
        line = {"audio_filepath": name, "duration": seconds, "text": "some words to say"}
        lines.append(json.dumps(line) + "\n")
    manifest, imported = folder / "train.jsonl", folder / "imported"
    manifest.write_text("".join(lines), encoding="utf-8")
    import_corpus(f"jsonl:{manifest}", imported, Settings(shard_clips=64))
    return str(imported)


def packed_rows(path: str) -> PackedRows:
    sources = [
        MixtureSource(path),
        MixtureSource(path, join=LongForm(12.0, 60.0)),
    ]
    tokenizer = prompts.PromptTokenizer(prompts.load_tokenizer(TOKENIZER))
    spec = audio.WindowSpec(frames=600)
    return PackedRows(sources, RowShape(16, 768, 448), spec, 10, tokenizer, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    flags.FLAGS(["feed_memory"])  # Grain's workers expect parsed absl flags
    print_banner("Memory of the input pipeline after a tenth of its batches and after all.", "cpu")
    first, resident = max(1, options.batches // 10), {}
    with tempfile.TemporaryDirectory() as folder:
        rows = packed_rows(write_corpus(pathlib.Path(folder)))
        batches, started = loader.batches(rows, 2, workers=options.workers), time.time()
        for number in range(1, options.batches + 1):
            next(batches)
            if number % first == 0:
                resident[number] = resident_mib()
                seconds = time.time() - started
                print(
                    f"{number:6d} batches  {resident[number]:8.1f} MiB  {seconds:7.1f} s",
                    flush=True,
                )
    early, late = resident[first], resident[max(resident)]
    result = {
        "batches": options.batches,
        "workers": options.workers,
        "mib": [round(early, 1), round(late, 1)],
        "growth": round(late / early - 1, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
