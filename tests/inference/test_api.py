"""The Python interface: files, arrays, lists, streams and text prompts on the tiny model."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file
from signals import noise_with_pauses, speech_like

import fastslm_jax
from fastslm_jax.audio import AudioError
from fastslm_jax.errors import UserError
from fastslm_jax.inference import api
from fastslm_jax.inference.generator import Generator

RATE = 16_000


@pytest.fixture(scope="module")
def loaded(model, params, prompt_tokenizer) -> api.Model:
    """Trained on 10 s, windows of 1 s."""
    return api.Model(Generator(model, params, prompt_tokenizer), 10.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "a.wav"
    soundfile.write(path, speech_like(2.2), RATE)
    return path


def test_a_file_and_its_samples_give_the_same_result(loaded, file):
    result = loaded.transcribe(file, max_new_tokens=8)
    assert (result.seconds, result.covered_seconds) == (2.2, 2.2)
    assert result.stop_reason in ("eos", "budget", "loop")
    (segment,) = result.segments
    assert (segment.start, segment.end, segment.text) == (0.0, 2.2, result.text)
    samples, _ = soundfile.read(file, dtype="int16")
    floats, _ = soundfile.read(file, dtype="float32")
    assert loaded.transcribe(str(file), max_new_tokens=8).text == result.text
    assert loaded.transcribe(samples, max_new_tokens=8).text == result.text
    assert loaded.transcribe(floats, RATE, max_new_tokens=8).text == result.text
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = ""


def test_a_list_gives_a_list(loaded, file):
    results = loaded.transcribe([file, speech_like(1.0, 3)], max_new_tokens=8)
    assert [result.seconds for result in results] == [2.2, 1.0]
    assert results[0].text == loaded.transcribe(file, max_new_tokens=8).text
    assert loaded.transcribe([]) == []


def test_arrays_are_resampled(loaded):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100 * 2)
    result = loaded.transcribe(samples, 44_100, max_new_tokens=4)
    assert result.seconds == 2.0


def test_streamed_results_grow_to_the_result(loaded, file):
    found = list(loaded.transcribe(file, stream=True, max_new_tokens=20))
    assert len(found) > 3
    assert [result.stop_reason for result in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1].text == loaded.transcribe(file, max_new_tokens=20).text


def test_long_recordings_are_cut_into_segments(loaded):
    samples = noise_with_pauses(14, pauses=(4.5, 9.5))
    result = loaded.transcribe(samples, max_new_tokens=4)
    assert len(result.segments) >= 3
    assert result.segments[-1].end == 14.0
    assert len(loaded.transcribe(samples, max_new_tokens=4, span=7).segments) >= 2
    assert len(loaded.transcribe(samples, task="ssum", max_new_tokens=4).segments) == 1


def test_a_prompt_replaces_the_instruction(loaded, file):
    by_prompt = {
        loaded.transcribe(file, prompt=p, max_new_tokens=12).text for p in (None, "be brief")
    }
    assert len(by_prompt) == 2


def test_context_is_added_to_the_instruction(loaded, file):
    def text(**options):
        return loaded.transcribe(file, max_new_tokens=12, **options).text

    prompt = "be brief\nContext: Anna, Vienna"
    assert text(prompt="be brief", context=["Anna", "Vienna"]) == text(prompt=prompt)
    assert text(context=" Anna ") == text(
        prompt="Transcribe the audio clip into text.\nContext: Anna"
    )
    assert text(context="") == text()


def test_text_prompts(loaded):
    answer = loaded.answer("where did anna go", 12)
    assert answer.text
    assert (answer.windows, answer.speech_tokens) == (0, 0)
    assert len(answer.token_ids) <= 12
    assert loaded.answer(["where did anna go", "hi"], 12)[0] == answer


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("missing.wav", {}, "missing.wav: no such audio file"),
        (np.zeros((2, 100)), {}, r"shape \[2, 100\]"),
        (np.zeros(0), {}, r"shape \[0\]"),
        (np.zeros(9, np.int32), {}, "int32"),
        (np.full(9, np.nan), {}, "NaN"),
        (np.zeros(9), {"sample_rate": 0}, "sample_rate=0"),
        (np.zeros(9), {"task": "sing"}, "task='sing': must be one of asr"),
        (np.zeros(9), {"span": "x"}, "span=x"),
        (np.zeros(9), {"max_new_tokens": 0}, "max_new_tokens=0"),
        (3, {}, "audio is a int"),
        ([3], {}, "audio is a int"),
        ([np.zeros(9)], {"stream": True}, "stream=True takes one recording"),
    ],
)
def test_bad_input_is_a_clear_line(loaded, given, options, message):
    with pytest.raises(UserError, match=message) as raised:
        loaded.transcribe(given, **options)
    assert "\n" not in str(raised.value)


def test_empty_prompts_are_rejected(loaded):
    with pytest.raises(UserError, match="a prompt must be a text"):
        loaded.answer(" ")


def test_audio_errors_are_audio_errors(loaded):
    with pytest.raises(AudioError):
        loaded.transcribe(np.zeros(0))


def test_importing_the_package_is_light():
    """Its names come on first use."""
    code = "import sys, fastslm_jax; print('jax' in sys.modules, callable(fastslm_jax.load))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert fastslm_jax.Model is api.Model
    with pytest.raises(AttributeError, match="nothing"):
        _ = fastslm_jax.nothing


def test_pretrained_weights_in_another_precision(tmp_path):
    """They are refused, and accepted with other_bases: the demo's encoder in float16."""
    folder = tmp_path / "whisper"
    shutil.copytree("assets/demo_whisper", folder)
    weights = load_file(folder / "model.safetensors")
    halves = {name: weight.astype(np.float16) for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors")
    given = {"whisper": str(folder), "llm": "assets/demo_llm"}
    with pytest.raises(UserError, match=r"different whisper weights .* or --other_bases"):
        fastslm_jax.load("assets/demo_model", **given)
    model = fastslm_jax.load("assets/demo_model", **given, other_bases=True)
    assert model.transcribe("assets/recordings/question.flac", task="sqqa").text
