"""The small model of public weights, `assets/real_model`, on recordings of a person.

FASTSLM_REAL names the folder that `test_real.py` describes. docs/real_model.md has all results.
"""

import json
import os
import pathlib

import numpy as np
import pytest

import fastslm_jax
from fastslm_jax.evaluation import metrics

REAL = pathlib.Path(os.environ.get("FASTSLM_REAL", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("FASTSLM_REAL"), reason="FASTSLM_REAL names no folder"
)
CHECKPOINT = pathlib.Path(__file__).parents[2] / "assets/real_model"
EVERY = 12  # one recording of so many


@pytest.fixture(scope="module")
def model():
    bases = {"whisper": str(REAL / "whisper-base"), "llm": str(REAL / "smollm2-135m")}
    return fastslm_jax.load(CHECKPOINT, **bases)


@pytest.fixture(scope="module")
def clips() -> list[dict]:
    lines = (REAL / "human/en/manifest.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][::EVERY]


@pytest.fixture(scope="module")
def answers(model, clips) -> list[str]:
    files = [REAL / "human/en" / clip["audio_filepath"] for clip in clips]
    return [result.text for result in model.transcribe(files)]


def word_error_rate(clips: list[dict], answers: list[str]) -> float:
    predictions = [
        {"task": "asr", "lang": "en", "reference": clip["text"], "hypothesis": answer}
        for clip, answer in zip(clips, answers, strict=True)
    ]
    return metrics.score(predictions)["wer"]


def test_recordings_of_a_person(clips, answers):
    wer = word_error_rate(clips, answers)
    print(f"WER of {len(clips)} recordings: {wer:.1f} %")
    assert wer < 40


def test_it_listens(clips, answers):
    """The answers to other recordings are wrong."""
    assert word_error_rate(clips, answers[1:] + answers[:1]) > 80


def test_noise_is_not_answered_with_a_sentence(model):
    noise = np.random.default_rng(0).normal(scale=0.02, size=3 * 16_000).astype(np.float32)
    assert len(model.transcribe(noise).text.split()) <= 1
