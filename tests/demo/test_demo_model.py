"""The demo model in assets/demo_model (from `make demo`) on unseen sentences and voices."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from fastslm_jax import audio
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.demo.__main__ import RECORDINGS
from fastslm_jax.demo.corpus import DEFAULT_COUNTS, build_corpus
from fastslm_jax.evaluation import predict
from fastslm_jax.inference import load
from fastslm_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator():
    before = os.getcwd()
    os.chdir(ROOT)  # the checkpoint refers to assets/demo_whisper and assets/demo_llm
    checkpoints = Checkpoints("assets/demo_model", read_only=True)
    step = load.find_step(checkpoints, "assets/demo_model")
    yield load.load(load.saved_config(checkpoints, "assets/demo_model", step), checkpoints, step)
    os.chdir(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    counts = {name: dict.fromkeys(tasks, 0) for name, tasks in DEFAULT_COUNTS.items()}
    counts["test_unseen_voices"]["asr"] = 24
    build_corpus(str(out), 7, counts, 1)
    return out


def wer(generator, utterances, clips=None):
    pairs = zip(utterances, clips or utterances, strict=True)
    recordings = [predict.recording(*pair) for pair in pairs]
    found = predict.predictions(generator, utterances, batch_size=24, recordings=recordings)
    return predict.summarize(found)["wer"]


def test_it_depends_on_the_audio(generator, corpus):
    utterances = read_manifest(str(corpus / "test_unseen_voices.jsonl"), ["asr"])
    assert wer(generator, utterances) < 10
    assert wer(generator, utterances, predict.swapped(utterances)) > 70


def test_flac_wav_and_mp3_of_a_sentence_give_the_same_speech_tokens(generator, corpus, tmp_path):
    utterance = read_manifest(str(corpus / "test_unseen_voices.jsonl"), ["asr"])[0]
    samples = audio.read_audio(utterance.path)
    tokens = {}
    for name in ("a.flac", "a.wav", "a.mp3"):
        soundfile.write(tmp_path / name, samples, audio.SAMPLE_RATE)
        decoded = audio.read_audio(tmp_path / name)
        decoded = decoded[: len(samples)]  # MP3 pads the last frame
        windows, frames = generator.model.window.cut(decoded)
        batch = (
            jnp.asarray(windows)[None],
            jnp.asarray(frames)[None],
            jnp.zeros((1, len(frames)), jnp.int32),
        )
        tokens[name] = np.asarray(generator.model.speech_tokens(generator.params, *batch))
    np.testing.assert_array_equal(tokens["a.wav"], tokens["a.flac"])
    # MP3 fills the digital silence of synthetic speech with noise, which the small encoder is
    # sensitive to: 24 sentences had 13 % WER as MP3 and 1.4 % as FLAC.
    mp3, flac = tokens["a.mp3"].ravel(), tokens["a.flac"].ravel()
    assert mp3 @ flac / (np.linalg.norm(mp3) * np.linalg.norm(flac)) > 0.75


def test_the_recordings_that_the_demo_begins_with():
    command = [sys.executable, "-m", "fastslm_jax.transcribe", *RECORDINGS]
    command += ["--checkpoint=assets/demo_model", "--format=json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    records = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        records[pathlib.Path(record["file"]).stem] = record["text"]
        assert record["covered_seconds"] == record["seconds"]
        assert record["stop_reason"] == "eos"
    assert records == {
        "sentence1": "please call daniel about the recipe on monday",
        "sentence2": "i would like eleven green chairs and two cookies please",
        "sentence3": "please send the report to thomas before monday afternoon",
    }
    (summary,) = done.stderr.splitlines()
    assert re.fullmatch(
        r"8\.9 s of audio in [\d.]+ s on cpu, after [\d.]+ s of compilation", summary
    )
