"""The checked-in demo model (assets/demo_model, the end of a `make demo`) on sentences and voices that it never saw."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from fastslm_jax import audio
from fastslm_jax.data.manifest import read_manifest
from fastslm_jax.demo import corpus as synthetic
from fastslm_jax.evaluation import predict
from fastslm_jax.inference import load
from fastslm_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator():
    before = os.getcwd()
    os.chdir(ROOT)  # the checkpoint names its bases as assets/demo_whisper and assets/demo_llm
    checkpoints = Checkpoints("assets/demo_model", read_only=True)
    step = load.find_step(checkpoints, "assets/demo_model")
    yield load.load(load.saved_config(checkpoints, "assets/demo_model", step), checkpoints, step)
    os.chdir(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    counts = {name: dict.fromkeys(tasks, 0) for name, tasks in synthetic.DEFAULT_COUNTS.items()}
    counts["test_unseen_voices"]["asr"] = 24
    synthetic.build_corpus(str(out), 7, counts, 1)
    return out


def wer(generator, utterances, clips=None):
    pairs = zip(utterances, clips or utterances, strict=True)
    recordings = [predict.recording(*pair) for pair in pairs]
    found = predict.predictions(generator, utterances, batch_size=24, recordings=recordings)
    return predict.summarize(found)["wer"]


def test_it_hears_rather_than_guesses(generator, corpus):
    utterances = read_manifest(str(corpus / "test_unseen_voices.jsonl"), ["asr"])
    assert wer(generator, utterances) < 10
    assert wer(generator, utterances, predict.swapped(utterances)) > 70


def test_flac_wav_and_mp3_of_a_sentence_give_the_same_speech_tokens(generator, corpus, tmp_path):
    utterance = read_manifest(str(corpus / "test_unseen_voices.jsonl"), ["asr"])[0]
    samples = audio.read_audio(utterance.path)
    tokens = {}
    for name in ("a.flac", "a.wav", "a.mp3"):
        soundfile.write(tmp_path / name, samples, audio.SAMPLE_RATE)
        heard = audio.read_audio(tmp_path / name)[
            : len(samples)
        ]  # an mp3 ends with the padding of its last frame
        windows, frames = generator.model.window.cut(heard)
        batch = (
            jnp.asarray(windows)[None],
            jnp.asarray(frames)[None],
            jnp.zeros((1, len(frames)), jnp.int32),
        )
        tokens[name] = np.asarray(generator.model.speech_tokens(generator.params, *batch))
    np.testing.assert_array_equal(tokens["a.wav"], tokens["a.flac"])
    # A codec fills the digital silence of synthetic speech with noise, which log-mel shows and the small encoder hears: of 24
    # sentences the MP3 files had 13 % WER, the FLAC files 1.4 %.
    mp3, flac = tokens["a.mp3"].ravel(), tokens["a.flac"].ravel()
    assert mp3 @ flac / (np.linalg.norm(mp3) * np.linalg.norm(flac)) > 0.75


def test_transcribe_from_the_command_line(corpus):
    utterance = read_manifest(str(corpus / "test_unseen_voices.jsonl"), ["asr"])[0]
    command = [sys.executable, "-m", "fastslm_jax.transcribe", str(utterance.path)]
    command += ["--checkpoint=assets/demo_model", "--format=json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["covered_seconds"] == record["seconds"]
    assert record["stop_reason"] == "eos"
