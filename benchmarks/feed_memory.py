"""Is the feed's memory flat? Resident size after 200 and after 2 000 batches, of this process and its workers.

    python benchmarks/feed_memory.py [--batches=2000] [--workers=0]

Batches are two rows of 16 windows of 6 s from an imported folder of 400 clips, many epochs of them, half of them joined.
Last line: one JSON object; `growth` is to be below 0.05.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import soundfile
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from fastslm_jax import audio
from fastslm_jax.data import loader, prompts
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.longform import LongForm
from fastslm_jax.data.packing import RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows

ROOT = pathlib.Path(__file__).parents[1]


def resident_mib() -> float:
    """Of this process and its children (Linux)."""
    pids = [os.getpid()]
    for pid in pids:  # grows while it is gone through
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
    pages = sum(int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_corpus(folder: pathlib.Path, clips: int) -> None:
    rng, lines = np.random.default_rng(0), []
    (folder / "wav").mkdir()
    for number in range(clips):
        seconds = rng.uniform(1, 6)
        soundfile.write(
            folder / f"wav/{number}.wav", rng.normal(0, 0.1, round(16_000 * seconds)), 16_000
        )
        lines.append(
            json.dumps(
                {
                    "audio_filepath": f"wav/{number}.wav",
                    "duration": seconds,
                    "text": "some words to say",
                }
            )
            + "\n"
        )
    (folder / "train.jsonl").write_text("".join(lines))
    import_corpus(f"jsonl:{folder}/train.jsonl", folder / "imported", Settings(shard_clips=64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    flags.FLAGS(["feed_memory"])  # Grain's workers look at them
    first = options.batches // 10
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_corpus(folder, 400)
        path, encoder = (
            str(folder / "imported"),
            prompts.PromptTokenizer(prompts.load_tokenizer(ROOT / "assets/demo_llm")),
        )
        sources = [
            MixtureSource(path),
            MixtureSource(path, join=LongForm(12.0, 60.0)),
        ]
        rows = PackedRows(
            sources, RowShape(16, 768, 448), audio.WindowSpec(frames=600), 10, encoder, seed=0
        )
        batches, resident, started = (
            loader.batches(rows, 2, workers=options.workers),
            {},
            time.time(),
        )
        for number in range(1, options.batches + 1):
            next(batches)
            if number % max(1, first) == 0:
                resident[number] = resident_mib()
                print(
                    f"{number:6d} batches  {resident[number]:8.1f} MiB  {time.time() - started:7.1f} s",
                    flush=True,
                )
    early, late = resident[first], resident[max(resident)]
    result = {
        "batches": options.batches,
        "workers": options.workers,
        "mib": [round(early, 1), round(late, 1)],
    }
    print(json.dumps(result | {"growth": round(late / early - 1, 4)}))


if __name__ == "__main__":
    main()
