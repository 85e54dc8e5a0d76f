"""Numbers of the authors' PyTorch implementation, in the folder FASTSLM_GOLDEN."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fastslm_jax import audio
from fastslm_jax.convert import exporting, importing
from fastslm_jax.inference.batching import ContinuousBatch, Prompt
from fastslm_jax.inference.capacity import PREFILL_CHUNK, bucketed_length
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.models import log_mel
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.hfq_former import HFQFormer
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.whisper import WhisperEncoder
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import SafetensorsSource

GOLDEN = pathlib.Path(
    os.environ.get("FASTSLM_GOLDEN", pathlib.Path(__file__).parents[2] / "shared/golden")
)
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "cases.json").exists(), reason=f"no golden folder at {GOLDEN}"
)
CASES = json.loads((GOLDEN / "cases.json").read_text()) if (GOLDEN / "cases.json").exists() else []
each_case = pytest.mark.parametrize("case", CASES, ids=[case["file"] for case in CASES])
TOLERANCE = 2e-4  # of the tensor's own maximum


@pytest.fixture(scope="module")
def model_and_params():
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
        tuple(config["stage_tokens"]),
        config["compression_size"],
        config["detail_recovery_layers"],
    )
    llm = pretrained.qwen3_from_config(
        config["llm"], lora=LoRA(lora["r"], lora["alpha"], lora["dropout"])
    )
    model = FastSLM(encoder, hfq_former, llm)
    layout = layouts.released(len(config["stage_tokens"]), config["detail_recovery_layers"])
    source = SafetensorsSource(GOLDEN / "model.safetensors")
    ignore = pretrained.tied_head(source, layouts.RELEASED_LLM) if llm.tied_embeddings else ()
    tree = jax.eval_shape(model.init, jax.random.key(0))
    params = engine.load(source, layout, tree, ignore)
    return model, jax.tree.map(jnp.asarray, params)


def assert_close(actual, expected, name, tolerance=TOLERANCE):
    scale = np.abs(expected).max()
    difference = np.abs(np.asarray(actual) - expected).max() / scale
    assert difference <= tolerance, f"{name}: differs by {difference:.1e} of its maximum"


# Every program is compiled once: windows go one at a time, and all prompts are padded on the right
# to one length, which a causal model does not see.


@functools.partial(jax.jit, static_argnums=0)
def encode_window(model, params, mel):
    """mel [1, frames, bands] → features, speech tokens, and what lies between by its name."""
    features = model.encoder.apply({"params": params["encoder"]}, mel)
    tokens, state = model.hfq_former.apply(
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


_speech: dict[str, tuple] = {}


def speech_side(case, model, params):
    """(mel [windows, frames, bands], features, speech tokens, intermediates) of a case."""
    if case["file"] not in _speech:
        windows, frames = model.window.cut(load_file(GOLDEN / case["file"])["audio"])
        mel = log_mel.log_mel(
            windows[None],
            frames[None],
            np.zeros((1, len(windows)), np.int32),
            model.encoder.num_mels,
        )[0]
        parts = [encode_window(model, params, mel[i : i + 1]) for i in range(len(mel))]
        _speech[case["file"]] = mel, *jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return _speech[case["file"]]


def spliced(case, ids, model, params):
    """A prompt (`<|AUDIO|>` as one id), padded: tokens, slots, speech, and its length."""
    speech = speech_side(case, model, params)[2].reshape(1, -1, model.llm.width)
    longest = max(one["windows"] for one in CASES) * model.tokens_per_window
    golden = [load_file(GOLDEN / one["file"]) for one in CASES]
    room = longest + max(len(one["input_ids"]) + len(one["greedy_ids"]) for one in golden)
    (at,) = np.flatnonzero(np.asarray(ids) == audio_token_id())
    num_speech = speech.shape[1]
    tokens = np.concatenate([ids[:at], np.zeros(num_speech, np.int32), ids[at + 1 :]]).astype(
        np.int32
    )
    slots = np.full((1, room), -1, np.int32)
    slots[0, at : at + num_speech] = np.arange(num_speech)
    padded = np.pad(speech, ((0, 0), (0, longest - num_speech), (0, 0)))
    return np.pad(tokens, (0, room - len(tokens)))[None], slots, padded, len(tokens)


def golden_logits(case, ids, model, params):
    *prompt, length = spliced(case, ids, model, params)
    return np.asarray(logits_of(model, params, *prompt))[:length]


@functools.cache
def audio_token_id() -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").convert_tokens_to_ids("<|AUDIO|>")


@each_case
def test_speech_side(case, model_and_params):
    model, params = model_and_params
    golden = load_file(GOLDEN / case["file"])
    mel, features, tokens, intermediates = speech_side(case, model, params)
    assert len(mel) == case["windows"]
    frames = golden["mel"].shape[1]
    joined = np.asarray(mel).reshape(-1, mel.shape[-1])
    np.testing.assert_allclose(joined[:frames].T, golden["mel"], atol=1e-4, rtol=0)
    assert not joined[max(frames, audio.MIN_SAMPLES // audio.HOP) :].any()

    assert_close(features[-1:, ::10], golden["encoder_out"], "encoder_out")
    for name, value in intermediates.items():
        value = value[-1:, ::10] if name.endswith("features") else value
        golden_name = name.removesuffix("_tokens") if name.startswith("detail_recovery") else name
        assert_close(value, golden[golden_name], name)
    assert_close(tokens, golden["speech_tokens"], "speech_tokens")


@each_case
def test_logits_and_loss(case, model_and_params):
    golden = load_file(GOLDEN / case["file"])
    logits = golden_logits(case, golden["input_ids"], *model_and_params)
    assert_close(logits, golden["logits"], "logits")
    log_probs = jax.nn.log_softmax(logits[:-1])
    loss = -np.mean(
        [log_probs[i, label] for i, label in enumerate(golden["labels"][1:]) if label != -100]
    )
    assert_close(loss, golden["loss"], "loss")


@each_case
def test_greedy_tokens(case, model_and_params):
    """From the decoding loop with its cache; without one, each from all those before it."""
    golden = load_file(GOLDEN / case["file"])
    expected = golden["greedy_ids"]
    prompt = golden["input_ids"][: int(golden["prompt_len"])]
    tokens, slots, speech, length = spliced(case, prompt, *model_and_params)
    at = int(np.flatnonzero(slots[0] == 0)[0])
    model, params = model_and_params
    decoded = Prompt(tokens[0, :length], speech[0, : slots.max() + 1], at, len(expected))
    batch = ContinuousBatch(
        model,
        params,
        rows=1,
        cache_length=bucketed_length(length + len(expected) + PREFILL_CHUNK),
        cache_dtype=jnp.float32,
        sampling=SamplingParams(),
        end_id=-1,
        detect_repetition=False,
        mesh=None,
    )
    (running,) = batch.run(iter([decoded]))
    assert (running.tokens, running.stop_reason) == (expected.tolist(), "budget")
    logits = golden_logits(case, np.concatenate([prompt, expected]), *model_and_params)
    np.testing.assert_array_equal(np.argmax(logits[length - 1 : -1], axis=-1), expected)


# --------------------------------------------------------------------------------------- conversion


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    out = tmp_path_factory.mktemp("golden") / "workdir"
    importing.import_checkpoint(GOLDEN, out)
    return out


def test_import_then_export_is_bit_equal(imported, tmp_path):
    exporting.export(imported, tmp_path / "released", "released")
    before, after = (
        load_file(GOLDEN / "model.safetensors"),
        load_file(tmp_path / "released/model.safetensors"),
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape), key
        assert after[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("merge_lora", [False, True], ids=["lora", "merged"])
def test_pytorch_folder(merge_lora, imported, model_and_params, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    exporting.export(imported, tmp_path / "hf", "hf", merge_lora=merge_lora)
    model = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for case in CASES:
        golden = load_file(GOLDEN / case["file"])
        ids, prompt, waveform = (
            torch.from_numpy(golden[name]) for name in ("input_ids", "input_ids", "audio")
        )
        with torch.no_grad():
            logits = model(ids, waveform).logits[0].numpy()
        assert_close(
            logits,
            golden_logits(case, golden["input_ids"], *model_and_params),
            case["file"],
            tolerance=1e-4,
        )
        prompt = prompt[: int(golden["prompt_len"])]
        new = model.generate_ids(
            prompt, waveform, max_new_tokens=len(golden["greedy_ids"]), eos_token_id=None
        )
        assert new.tolist() == golden["greedy_ids"].tolist()


def test_peft_adapter(imported, model_and_params, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Qwen3ForCausalLM

    model, params = model_and_params
    exporting.export(imported, tmp_path / "adapter", "peft")
    base = Qwen3ForCausalLM.from_pretrained(imported / "bases/llm")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for case in CASES:
        golden = load_file(GOLDEN / case["file"])
        ids = golden["input_ids"]
        tokens, slots, speech, length = spliced(case, ids, model, params)
        embeddings = torch.from_numpy(
            np.array(model.splice(params, tokens, slots, speech)[:, :length])
        )
        with torch.no_grad():
            logits = adapted(inputs_embeds=embeddings).logits[0].numpy()
        assert_close(logits, golden_logits(case, ids, model, params), case["file"], tolerance=1e-4)
        prompt = embeddings[:, : length - len(ids) + int(golden["prompt_len"])]
        options = {
            "max_new_tokens": len(golden["greedy_ids"]),
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        mask = torch.ones(prompt.shape[:2], dtype=torch.long)
        new = adapted.generate(inputs_embeds=prompt, attention_mask=mask, **options)[0]
        assert new.tolist() == golden["greedy_ids"].tolist()
