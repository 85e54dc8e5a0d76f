"""Audio seconds per second on one core: decoding, decoding with resampling, and whole rows, beside a plain soundfile loop.

    python benchmarks/input.py [--clips=200] [--metrics=runs/demo]

Clips are 12 s of noise that is as hard for a codec as speech. `decode` reads them as training does, from files and from an
imported folder (FLAC, 16 kHz); `decode + resample` reads 44.1 kHz stereo; `rows` makes packed rows of an imported folder, tokens
and all. Seconds are CPU seconds of this process; the ways take turns, and the best turn of each counts. With --metrics, the
fraction of its time for which each stage of that demo waited for data, over all logged steps.
Last line: one JSON object.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import soundfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from fastslm_jax import audio
from fastslm_jax.data import prompts
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.manifest import read_clip, read_manifest
from fastslm_jax.data.packing import RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows

SECONDS, TURNS = 12.0, 5
ROOT = pathlib.Path(__file__).parents[1]


def write_clips(folder: pathlib.Path, count: int, rate: int, channels: int) -> pathlib.Path:
    """FLAC files of noise whose loudness comes and goes, and their manifest."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        smooth = np.cumsum(rng.standard_normal((round(rate * SECONDS), channels)), axis=0)
        smooth = smooth[8:] - smooth[:-8]
        loudness = 0.02 * (1.1 + np.sin(2 * np.pi * 3 * np.arange(len(smooth)) / rate))[:, None]
        samples = loudness * smooth / 3
        soundfile.write(folder / f"{number}.flac", samples, rate, subtype="PCM_16")
        text = " ".join(f"word{word}" for word in rng.integers(1000, size=30))
        line = {
            "audio_filepath": f"{number}.flac",
            "duration": len(samples) / rate,
            "text": text,
            "id": str(number),
        }
        lines.append(json.dumps(line) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


def waiting(run: pathlib.Path) -> dict[str, float]:
    """Of each stage of a demo: seconds waited for data over seconds of training."""
    shares = {}
    for file in sorted(run.glob("stage*/metrics.jsonl")):
        steps = [
            line
            for line in map(json.loads, file.read_text().splitlines())
            if "data_wait_fraction" in line
        ]
        previous, waited, total = 1, 0.0, 0.0
        for line in steps:
            seconds = (line["step"] - previous) * line["step_seconds"]
            waited, total, previous = (
                waited + seconds * line["data_wait_fraction"],
                total + seconds,
                line["step"],
            )
        shares[file.parent.name] = round(waited / max(total, 1e-9), 5)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--metrics", type=pathlib.Path, help="folder of a demo run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = write_clips(pathlib.Path(folder, "ours"), options.clips, audio.SAMPLE_RATE, 1)
        other = write_clips(pathlib.Path(folder, "other"), options.clips, 44_100, 2)
        settings = Settings(tokenizer=str(ROOT / "assets/demo_llm"))
        import_corpus(f"jsonl:{ours}", pathlib.Path(folder, "imported"), settings)
        imported = read_manifest(pathlib.Path(folder, "imported"))
        encoder = prompts.PromptTokenizer(prompts.load_tokenizer(ROOT / "assets/demo_llm"))
        source = MixtureSource(str(pathlib.Path(folder, "imported")))
        rows = PackedRows(
            [source], RowShape(8, 1920, 1408), audio.WindowSpec(), 50, encoder, seed=0
        )
        num_rows = len(rows.plan(0)[1])

        ways = {
            "soundfile loop": lambda: [
                soundfile.read(u.path, dtype="int16") for u in read_manifest(ours)
            ],
            "decode, files": lambda: [read_clip(u) for u in read_manifest(ours)],
            "decode, imported": lambda: [read_clip(u) for u in imported],
            "soundfile loop, 44.1 kHz stereo": lambda: [
                soundfile.read(u.path, dtype="float32") for u in read_manifest(other)
            ],
            "decode + resample, 44.1 kHz stereo": lambda: [
                read_clip(u) for u in read_manifest(other)
            ],
            "rows": lambda: [rows[number] for number in range(num_rows)],
        }
        best = dict.fromkeys(ways, float("inf"))
        for _, (name, way) in itertools.product(range(TURNS), ways.items()):
            started = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - started)
    speeds = {name: options.clips * SECONDS / seconds for name, seconds in best.items()}
    for name, speed in speeds.items():
        base = "soundfile loop, 44.1 kHz stereo" if "44.1" in name else "soundfile loop"
        print(
            f"{name:38} {speed:9.0f} audio s/s per core   {speed / speeds[base]:5.2f} of the {base}"
        )
    result = {name: round(speed, 1) for name, speed in speeds.items()}
    result["decode_ratio"] = round(
        min(speeds["decode, files"], speeds["decode, imported"]) / speeds["soundfile loop"], 3
    )
    if options.metrics:
        result["data_wait_fraction"] = waiting(options.metrics)
        print(
            "waits for data: "
            + ", ".join(
                f"{stage} {share:.2%}" for stage, share in result["data_wait_fraction"].items()
            )
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
