"""Seconds of audio per CPU second: decoding, resampling and whole rows, against a soundfile loop.

    python benchmarks/input.py [--clips=200] [--metrics=runs/demo]

Clips are 12 s of noise that compresses about as well as speech. `decode` reads them as training
does, from files and from an imported folder (FLAC, 16 kHz); `decode + resample` reads 44.1 kHz
stereo; `rows` builds packed rows of an imported folder, including tokens. Time is CPU time of this
process; the methods alternate, and the best of five turns counts. --metrics adds the fraction of
its time that each training stage of a demo run waited for data. Last line: one JSON object.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import soundfile
from banner import print_banner

from fastslm_jax import audio
from fastslm_jax.data import prompts
from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings
from fastslm_jax.data.manifest import read_clip, read_manifest
from fastslm_jax.data.packing import RowShape
from fastslm_jax.data.rows import MixtureSource, PackedRows

SECONDS, TURNS = 12.0, 5
LOOP, STEREO_LOOP = "soundfile loop", "soundfile loop, 44.1 kHz stereo"
TOKENIZER = pathlib.Path(__file__).parents[1] / "assets/demo_llm"


def write_clips(folder: pathlib.Path, count: int, rate: int, channels: int) -> pathlib.Path:
    """FLAC files of noise with varying loudness. Returns the path of their manifest."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        smooth = np.cumsum(rng.standard_normal((round(rate * SECONDS), channels)), axis=0)
        smooth = smooth[8:] - smooth[:-8]
        loudness = 0.02 * (1.1 + np.sin(2 * np.pi * 3 * np.arange(len(smooth)) / rate))[:, None]
        samples = loudness * smooth / 3
        soundfile.write(folder / f"{number}.flac", samples, rate, subtype="PCM_16")
        line = {
            "audio_filepath": f"{number}.flac",
            "duration": len(samples) / rate,
            "text": " ".join(f"word{word}" for word in rng.integers(1000, size=30)),
            "id": str(number),
        }
        lines.append(json.dumps(line) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "train.jsonl"


def make_methods(folder: pathlib.Path, clips: int) -> dict[str, Callable[[], object]]:
    """Calls by name; each reads all clips once."""
    mono = write_clips(folder / "mono", clips, audio.SAMPLE_RATE, 1)
    stereo = write_clips(folder / "stereo", clips, 44_100, 2)
    imported = folder / "imported"
    import_corpus(f"jsonl:{mono}", imported, Settings(tokenizer=str(TOKENIZER)))
    tokenizer = prompts.PromptTokenizer(prompts.load_tokenizer(TOKENIZER))
    source, spec = MixtureSource(str(imported)), audio.WindowSpec()
    rows = PackedRows([source], RowShape(8, 1920, 1408), spec, 50, tokenizer, seed=0)
    num_rows, imported_clips = len(rows.plan(0)[1]), read_manifest(imported)

    def soundfile_loop(manifest: pathlib.Path, dtype: str) -> list[np.ndarray]:
        return [soundfile.read(clip.path, dtype=dtype)[0] for clip in read_manifest(manifest)]

    return {
        LOOP: lambda: soundfile_loop(mono, "int16"),
        "decode, files": lambda: [read_clip(clip) for clip in read_manifest(mono)],
        "decode, imported": lambda: [read_clip(clip) for clip in imported_clips],
        STEREO_LOOP: lambda: soundfile_loop(stereo, "float32"),
        "decode + resample, 44.1 kHz stereo": lambda: [
            read_clip(clip) for clip in read_manifest(stereo)
        ],
        "rows": lambda: [rows[number] for number in range(num_rows)],
    }


def data_wait_fractions(run: pathlib.Path) -> dict[str, float]:
    """{stage: seconds waited for data / seconds of training} of a demo run."""
    fractions = {}
    for file in sorted(run.glob("stage*/metrics.jsonl")):
        previous, waited, total = 1, 0.0, 0.0
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if "data_wait_fraction" in line:
                seconds = (line["step"] - previous) * line["step_seconds"]
                waited += seconds * line["data_wait_fraction"]
                total, previous = total + seconds, line["step"]
        fractions[file.parent.name] = round(waited / max(total, 1e-9), 5)
    return fractions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--metrics", type=pathlib.Path, help="folder of a demo run")
    options = parser.parse_args()
    print_banner("Audio decoding and row building against a plain soundfile loop.", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        methods = make_methods(pathlib.Path(folder), options.clips)
        best = dict.fromkeys(methods, float("inf"))
        for turn, (name, method) in itertools.product(range(TURNS), methods.items()):
            started = time.process_time()
            method()
            best[name] = min(best[name], time.process_time() - started)
            print(f"turn {turn + 1} of {TURNS}: {name}", file=sys.stderr, flush=True)
    speeds = {name: options.clips * SECONDS / seconds for name, seconds in best.items()}
    for name, speed in speeds.items():
        loop = STEREO_LOOP if "44.1" in name else LOOP
        print(f"{name:38} {speed:9.0f} audio s/s per core  {speed / speeds[loop]:5.2f} × {loop}")
    result = {name: round(speed, 1) for name, speed in speeds.items()}
    slowest = min(speeds["decode, files"], speeds["decode, imported"])
    result["decode_ratio"] = round(slowest / speeds[LOOP], 3)
    if options.metrics:
        result["data_wait_fraction"] = data_wait_fractions(options.metrics)
        for stage, fraction in result["data_wait_fraction"].items():
            print(f"{stage} waited for data {fraction:.2%} of its time")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
