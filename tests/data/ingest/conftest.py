"""Corpora for the import tests."""

import json

import numpy as np
import pytest
import soundfile
from signals import noise

from fastslm_jax.data.ingest.importing import import_corpus
from fastslm_jax.data.ingest.shards import Settings


@pytest.fixture(scope="session")
def write_manifest():
    """write_manifest(folder, lines) → the source "jsonl:…"; lines are JSON objects or raw text."""

    def write(folder, lines) -> str:
        lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        text = "".join(f"{line}\n" for line in lines)
        (folder / "train.jsonl").write_text(text, encoding="utf-8")
        return f"jsonl:{folder}/train.jsonl"

    return write


@pytest.fixture(scope="session")
def noise_corpus(tmp_path_factory, write_manifest) -> str:
    """Twelve clips of 1 to 2.1 s: four formats, three sample rates, every third one stereo."""
    folder, lines = tmp_path_factory.mktemp("noise"), []
    for number in range(12):
        suffix = ("wav", "flac", "ogg", "mp3")[number % 4]
        rate = (16_000, 44_100, 8_000)[number % 3]
        samples = noise(1 + 0.1 * number, number, rate)
        samples = np.stack([samples, samples], axis=1) if number % 3 == 0 else samples
        soundfile.write(folder / f"{number}.{suffix}", samples, rate)
        line = {
            "audio_filepath": f"{number}.{suffix}",
            "duration": 1 + 0.1 * number,
            "text": f"word {number}",
            "id": f"u{number}",
            "speaker": number % 2,
            "recording": "tape",
        }
        lines.append(line)
    return write_manifest(folder, lines)


@pytest.fixture(scope="session")
def imported(noise_corpus, tmp_path_factory):
    """The noise corpus as an imported folder of three shards."""
    out = tmp_path_factory.mktemp("imported") / "train"
    import_corpus(noise_corpus, out, Settings(shard_clips=5))
    return out


@pytest.fixture(scope="session")
def file_contents():
    """file_contents(folder) → {file name: bytes}."""
    return lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
