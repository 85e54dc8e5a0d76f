"""Parity with the authors' PyTorch implementation.

The expected numbers are in tests/golden, or in the folder named by the environment variable
FASTSLM_GOLDEN. Any folder of that layout must pass (see tests/golden/README.md). What a folder
does not contain is skipped, and the skip names it.
"""

import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights
from safetensors.numpy import load_file, save_file

from fastslm_jax import audio
from fastslm_jax.convert import exporting, importing
from fastslm_jax.inference.batching import ContinuousBatch, Prompt
from fastslm_jax.inference.capacity import PREFILL_CHUNK, bucketed_length
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models import log_mel
from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import SafetensorsSource

GOLDEN = pathlib.Path(
    os.environ.get("FASTSLM_GOLDEN", pathlib.Path(__file__).parent / "golden")
).resolve()
CASES = json.loads((GOLDEN / "cases.json").read_text())
each_case = pytest.mark.parametrize("case", CASES, ids=[case["file"] for case in CASES])
TOLERANCE = 2e-4  # relative to the tensor's maximum


@functools.cache
def golden(case_file: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / case_file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden folder with model.safetensors, which is rebuilt if the folder has none."""
    if (GOLDEN / "model.safetensors").exists():
        return GOLDEN
    folder = tmp_path_factory.mktemp("golden") / "checkpoint"
    shutil.copytree(GOLDEN, folder)
    save_file(weights.build(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model_and_params(checkpoint):
    config = json.loads((GOLDEN / "config.json").read_text())
    width, lora = config["speech_dim"], config["lora"]
    encoder = WhisperEncoder(
        width,
        config["encoder_layers"],
        config["encoder_heads"],
        4 * width,
        config["n_mels"],
        config["n_audio_ctx"],
    )
    hfq_former = HFQFormer(
        config["llm"]["hidden_size"],
        stage_tokens=tuple(config["stage_tokens"]),
        compression_size=config["compression_size"],
        detail_recovery_layers=config["detail_recovery_layers"],
    )
    llm = pretrained.decoder_from_config(
        config["llm"], lora=LoRA(lora["r"], lora["alpha"], lora["dropout"])
    )
    model = FastSLM(encoder, hfq_former, llm)
    layout = layouts.released(len(config["stage_tokens"]), config["detail_recovery_layers"])
    source = SafetensorsSource(checkpoint / "model.safetensors")
    ignore = pretrained.tied_head(source, layouts.RELEASED_LLM) if llm.tied_embeddings else ()
    tree = jax.eval_shape(model.init, jax.random.key(0))
    params = engine.load(source, layout, tree, ignore)
    return model, jax.tree.map(jnp.asarray, params)


def assert_close(actual, expected, name, tolerance=TOLERANCE):
    scale = np.abs(expected).max()
    difference = np.abs(np.asarray(actual) - expected).max() / scale
    assert difference <= tolerance, f"{name}: relative difference {difference:.1e}"


# Every function is compiled once: windows are encoded one at a time, and prompts of all cases are
# padded on the right to one length, which does not affect a causal model.


@functools.partial(jax.jit, static_argnums=0)
def encode_window(model, params, mel):
    """mel [1, frames, bands] → features, speech tokens, and named intermediates."""
    features = model.encoder.apply({"params": params["encoder"]}, mel)
    tokens, state = model.adapter.apply(
        {"params": params["hfq_former"]}, features, mutable="intermediates"
    )
    return features, tokens, {name: value for name, (value,) in state["intermediates"].items()}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, slots, speech):
    embeddings = model.splice(params, tokens, slots, speech)
    hidden, _ = model.llm.apply(
        {"params": params["llm"]}, embeddings, jnp.arange(tokens.shape[1])[None]
    )
    return model.logits(params, hidden)[0]


_speech_sides: dict[str, tuple] = {}


def speech_side(case, model, params):
    """mel [windows, frames, bands], features, speech tokens, and intermediates of a case."""
    if case["file"] not in _speech_sides:
        windows, frames = model.window.cut(golden(case["file"])["audio"])
        recording = np.zeros((1, len(windows)), np.int32)
        num_mels = model.encoder.num_mels
        mel = log_mel.log_mel(windows[None], frames[None], recording, num_mels)[0]
        parts = [encode_window(model, params, mel[i : i + 1]) for i in range(len(mel))]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        _speech_sides[case["file"]] = mel, *joined
    return _speech_sides[case["file"]]


def speech_tokens(case, model, params):
    """Speech tokens [windows, tokens, d]: ours, or the authors' if the case has no audio."""
    if "audio" in golden(case["file"]):
        return speech_side(case, model, params)[2]
    return golden(case["file"])["speech_tokens"]


def spliced(case, ids, model, params):
    """A padded prompt (`<|AUDIO|>` is one id): tokens, slots, speech, and its length."""
    speech = speech_tokens(case, model, params).reshape(1, -1, model.llm.width)
    num_speech = speech.shape[1]
    max_speech = max(one["windows"] for one in CASES) * model.tokens_per_window
    texts = [golden(one["file"]) for one in CASES]
    max_length = max_speech + max(len(x["input_ids"]) + len(x["greedy_ids"]) for x in texts)
    (at,) = np.flatnonzero(np.asarray(ids) == audio_token_id())
    tokens = np.concatenate([ids[:at], np.zeros(num_speech, np.int32), ids[at + 1 :]])
    tokens = tokens.astype(np.int32)
    slots = np.full((1, max_length), -1, np.int32)
    slots[0, at : at + num_speech] = np.arange(num_speech)
    padded = np.pad(speech, ((0, 0), (0, max_speech - num_speech), (0, 0)))
    return np.pad(tokens, (0, max_length - len(tokens)))[None], slots, padded, len(tokens)


def golden_logits(case, ids, model, params):
    *prompt, length = spliced(case, ids, model, params)
    return np.asarray(logits_of(model, params, *prompt))[:length]


@functools.cache
def audio_token_id() -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").convert_tokens_to_ids("<|AUDIO|>")


@each_case
def test_speech_side(case, model_and_params):
    """Every tensor from the audio to the speech tokens."""
    expected = golden(case["file"])
    if "audio" not in expected:
        pytest.skip(f"{GOLDEN / case['file']} has no audio, hence no mel and no features")
    mel, features, tokens, intermediates = speech_side(case, *model_and_params)
    assert len(mel) == case["windows"]
    frames = len(expected["audio"]) // audio.HOP
    joined = np.asarray(mel).reshape(-1, mel.shape[-1])
    assert not joined[max(frames, audio.MIN_SAMPLES // audio.HOP) :].any()

    actual = {"encoder_out": features[-1:, ::10], "speech_tokens": tokens}
    for name, value in intermediates.items():
        if name.endswith("features"):
            actual[name] = value[-1:, ::10]
        elif name.startswith("detail_recovery"):
            actual[name.removesuffix("_tokens")] = value
        else:
            actual[name] = value
    missing = {"mel", *actual} - expected.keys()
    if "mel" in expected:
        assert expected["mel"].shape[1] == frames
        np.testing.assert_allclose(joined[:frames].T, expected["mel"], atol=1e-4, rtol=0)
    for name in actual.keys() - missing:
        assert_close(actual[name], expected[name], name)
    if missing:
        pytest.skip(f"{GOLDEN / case['file']} has no {sorted(missing)}; all others match")


@each_case
def test_logits_and_loss(case, model_and_params):
    expected = golden(case["file"])
    logits = golden_logits(case, expected["input_ids"], *model_and_params)
    assert_close(logits, expected["logits"], "logits")
    log_probs = jax.nn.log_softmax(logits[:-1])
    labels = expected["labels"][1:]
    loss = -np.mean([log_probs[i, label] for i, label in enumerate(labels) if label != -100])
    assert_close(loss, expected["loss"], "loss")


@each_case
def test_greedy_tokens(case, model_and_params):
    """Greedy decoding with the key-value cache, and without it from the full forward pass."""
    expected = golden(case["file"])["greedy_ids"]
    prompt = golden(case["file"])["input_ids"][: int(golden(case["file"])["prompt_len"])]
    tokens, slots, speech, length = spliced(case, prompt, *model_and_params)
    at = int(np.flatnonzero(slots[0] == 0)[0])
    decoded = Prompt(tokens[0, :length], speech[0, : slots.max() + 1], at, len(expected))
    model, params = model_and_params
    batch = ContinuousBatch(
        model,
        params,
        rows=1,
        cache_length=bucketed_length(length + len(expected) + PREFILL_CHUNK),
        cache_dtype=jnp.float32,
        sampling=SamplingParams(),
        end_ids=[],
        detect_repetition=False,
        mesh=None,
    )
    (running,) = batch.run(iter([decoded]))
    assert (running.tokens, running.stop_reason) == (expected.tolist(), "budget")
    logits = golden_logits(case, np.concatenate([prompt, expected]), *model_and_params)
    np.testing.assert_array_equal(np.argmax(logits[length - 1 : -1], axis=-1), expected)


@pytest.fixture(scope="module")
def imported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "workdir"
    importing.import_checkpoint(checkpoint, out)
    return out


def test_import_and_export_round_trip_is_bit_equal(checkpoint, imported, tmp_path):
    exporting.export(imported, tmp_path / "released", "released")
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "released/model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape), key
        assert after[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("merge_lora", [False, True], ids=["lora", "merged"])
def test_exported_pytorch_folder(merge_lora, imported, model_and_params, tmp_path):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq

    exporting.export(imported, tmp_path / "hf", "hf", merge_lora=merge_lora)
    code = {"trust_remote_code": True}
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "hf", **code)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "hf", **code)
    for case in CASES:
        expected = golden(case["file"])
        if "audio" not in expected:
            continue
        inputs = extractor(expected["audio"], return_tensors="pt")
        ids, audio_id = expected["input_ids"], model.config.audio_token_id
        (position,) = np.flatnonzero(ids == audio_id)
        speech = [audio_id] * int(inputs["num_audio_tokens"])
        prompt = [*ids[:position], *speech, *ids[position + 1 : int(expected["prompt_len"])]]
        tokens = torch.tensor([[*prompt, *ids[int(expected["prompt_len"]) :]]])
        with torch.no_grad():
            logits = model(tokens, **inputs).logits[0].numpy()
        ours = golden_logits(case, expected["input_ids"], *model_and_params)
        assert_close(logits, ours, case["file"], tolerance=1e-4)
        prompt = torch.tensor([prompt])
        options = {"max_new_tokens": len(expected["greedy_ids"]), "eos_token_id": None}
        mask = torch.ones_like(prompt)
        new = model.generate(prompt, attention_mask=mask, **inputs, **options)[0, prompt.shape[1] :]
        assert new.tolist() == expected["greedy_ids"].tolist()


def test_exported_peft_adapter(imported, model_and_params, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Qwen3ForCausalLM

    model, params = model_and_params
    exporting.export(imported, tmp_path / "adapter", "peft")
    base = Qwen3ForCausalLM.from_pretrained(imported / "bases/llm")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for case in CASES:
        expected = golden(case["file"])
        ids = expected["input_ids"]
        tokens, slots, speech, length = spliced(case, ids, model, params)
        embeddings = np.array(model.splice(params, tokens, slots, speech)[:, :length])
        embeddings = torch.from_numpy(embeddings)
        with torch.no_grad():
            logits = adapted(inputs_embeds=embeddings).logits[0].numpy()
        assert_close(logits, golden_logits(case, ids, model, params), case["file"], tolerance=1e-4)
        prompt = embeddings[:, : length - len(ids) + int(expected["prompt_len"])]
        options = {
            "max_new_tokens": len(expected["greedy_ids"]),
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        mask = torch.ones(prompt.shape[:2], dtype=torch.long)
        new = adapted.generate(inputs_embeds=prompt, attention_mask=mask, **options)[0]
        assert new.tolist() == expected["greedy_ids"].tolist()
