"""Pretrained weights and recordings of a human voice, against `transformers`.

FASTSLM_REAL names a folder with these models in Hugging Face layout, and recordings:

    whisper-base    openai/whisper-base
    smollm2-135m    HuggingFaceTB/SmolLM2-135M-Instruct
    human/en        a manifest.jsonl of recordings (audio_filepath, text)

Without it, these tests are skipped.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperModel

from fastslm_jax import audio, sharding
from fastslm_jax import config as config_lib
from fastslm_jax.convert import exporting, logits, opening
from fastslm_jax.inference.generator import Generator, Request
from fastslm_jax.models import log_mel
from fastslm_jax.training import experiment
from fastslm_jax.training.checkpoint import Checkpoints

REAL = pathlib.Path(os.environ.get("FASTSLM_REAL", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("FASTSLM_REAL"), reason="FASTSLM_REAL names no folder"
)
TOLERANCE = 1e-4  # relative to the largest value
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Repeat after me: <|im_end|> is a marker.",
)
NEW_TOKENS = 24


def assert_close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"largest difference: {error:.1e} of the largest value")
    assert error <= TOLERANCE


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    """Three recordings of 2 to 5 s, int16 at 16 kHz."""
    lines = (REAL / "human/en/manifest.jsonl").read_text().splitlines()
    clips = [clip for clip in map(json.loads, lines) if 2 <= clip["duration"] <= 5]
    paths = [REAL / "human/en" / clip["audio_filepath"] for clip in clips]
    return [audio.decode(str(path)) for path in paths[:: len(paths) // 3][:3]]


def get_config(**model_options):
    config = config_lib.full_size()
    config.base.whisper, config.base.llm = str(REAL / "whisper-base"), str(REAL / "smollm2-135m")
    config.model.update({"dtype": "float32", "base_dtype": "float32", "remat": "none"})
    config.model.update(model_options)
    return config


def load(config):
    setup = experiment.build(config)
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    return setup, experiment.init_params(setup, mesh)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A model that has not been trained, with windows of 6 s."""
    options = {"window_seconds": 6.0, "compression_size": 0, "query_init": "temporal"}
    config = get_config(**options)
    setup, params = load(config)
    assert setup.model.tokens_per_window == 10
    assert setup.model.llm.vocab_size == 49_216  # 49 152, and 64 for nine added tokens
    saved = experiment.saved_paths(params, config.trainable)
    rng = np.random.default_rng(0)
    ours = {path: params[path] for path in saved}
    for path in [path for path in ours if path.endswith("lora_b")]:
        ours[path] = jnp.asarray(0.01 * rng.normal(size=ours[path].shape), jnp.float32)
    meta = {
        "config": json.loads(config.to_json_best_effort()),
        "row": 0,
        "bases": setup.fingerprints(),
    }
    folder = tmp_path_factory.mktemp("real") / "run"
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, ours, {}, meta)
    checkpoints.wait()
    checkpoints.close()
    tree = unflatten_dict(params | ours, sep="/")
    return folder, Generator(setup.model, tree, setup.prompt_tokenizer())


def test_encoder_features(recordings):
    """From the samples to the features, in windows of 30 s."""
    setup, params = load(get_config(audio_padding="whisper"))
    model = setup.model
    weights = unflatten_dict(params, sep="/")["encoder"]
    extractor = WhisperFeatureExtractor(feature_size=80)
    theirs = WhisperModel.from_pretrained(REAL / "whisper-base", dtype=torch.float32).encoder
    for samples in recordings:
        waveform = samples.astype(np.float32) / 32768
        windows, frames = model.window.cut(waveform)
        recording = np.zeros((1, 1), np.int32)
        mel = log_mel.log_mel(windows[None], frames[None], recording, 80)[0]
        features = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            expected = theirs(features).last_hidden_state.numpy()
        assert_close(jax.jit(model.encoder.apply)({"params": weights}, mel), expected)


@pytest.fixture(scope="module")
def smollm2():
    return AutoModelForCausalLM.from_pretrained(REAL / "smollm2-135m", dtype=torch.float32).eval()


def chat_ids(question: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(REAL / "smollm2-135m")
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_decoder_logits(workdir, smollm2):
    """Without LoRA, as for all prompts without audio."""
    generator = workdir[1]
    llm, ids = generator.model.llm, np.array([chat_ids(QUESTIONS[0])], np.int32)
    variables = {"params": generator.params["llm"]}
    hidden, _ = llm.apply(
        variables,
        llm.apply(variables, ids, method="embed"),
        np.arange(ids.shape[1])[None],
        lora_gate=jnp.zeros((1, 1)),
    )
    ours = llm.apply(variables, hidden, method="logits")
    with torch.no_grad():
        expected = smollm2(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    assert_close(ours[..., : expected.shape[-1]], expected)


def test_greedy_answers_of_text_prompts(workdir, smollm2):
    generator = workdir[1]
    requests = [Request(None, None, question, NEW_TOKENS) for question in QUESTIONS]
    for request, answer in zip(requests, generator.answer(requests), strict=True):
        ids = generator.prompt_tokenizer.prompt_ids(None, request.instruction)
        if "<|" not in request.instruction:  # a control token there is text for us only
            assert list(ids) == chat_ids(request.instruction)
        with torch.no_grad():
            new = smollm2.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=2
            )[0, len(ids) :]
        assert [i for i in new.tolist() if i != 2] == list(answer.token_ids)
        print(f"{request.instruction} {answer.text}")


def test_exported_model_gives_the_same_text_and_logits(workdir, recordings, tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoModelForSpeechSeq2Seq

    folder, generator = workdir
    exporting.export(folder, tmp_path / "hf", "hf")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    answers = generator.answer(
        [Request(samples, max_new_tokens=NEW_TOKENS) for samples in recordings]
    )
    given, ids = opening.open_workdir(folder), generator.prompt_tokenizer.prompt_ids("asr")
    for samples, answer in zip(recordings, answers, strict=True):
        waveform = samples.astype(np.float32) / 32768
        text = model.transcribe(waveform, max_new_tokens=NEW_TOKENS)
        assert answer.stop_reason in ("eos", "budget")
        assert text == answer.text
        inputs = model.processor.apply_transcription_request(waveform)
        with torch.no_grad():
            assert_close(logits.run_jax(given, waveform, ids), model(**inputs).logits[0])
