"""PyTorch folders and PEFT adapters give the same logits and greedy tokens as JAX."""

import numpy as np
import pytest

from fastslm_jax import audio
from fastslm_jax.convert import checking, logits, opening
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.inference.generator import Generator, Request
from fastslm_jax.models import log_mel

torch = pytest.importorskip("torch")
TOLERANCE = 1e-4  # relative to the largest logit
NEW_TOKENS = 16
# Recordings of 1, 2 and 5 windows of 1 s; shorter ones are padded to 1 s.
RECORDINGS = [
    np.round(32768 * checking.synthetic_signal(seconds)).astype(np.int16)
    for seconds in (0.7, 1.5, 4.6)
]
SAMPLES = RECORDINGS[1]
WAVEFORMS = [samples.astype(np.float32) / 32768.0 for samples in RECORDINGS]
WAVEFORM = WAVEFORMS[1]
ENDLESS = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None}


@pytest.fixture(scope="module")
def expected(workdir):
    """From JAX: prompt ids, logits and new tokens for the recordings and a prompt without audio."""
    given = opening.open_workdir(workdir)
    tokenizer = PromptTokenizer(given.load_tokenizer())
    generator = Generator(given.model, logits.materialize(given), tokenizer)
    tokenizer.end_id = -1  # never stop early
    ids = tokenizer.prompt_ids("asr")
    requests = [Request(samples, max_new_tokens=NEW_TOKENS) for samples in RECORDINGS]
    requests.append(Request(None, None, "what is red?", max_new_tokens=NEW_TOKENS))
    *answers, text_answer = generator.answer(requests)
    return {
        "ids": ids,
        "logits": [logits.run_jax(given, waveform, ids) for waveform in WAVEFORMS],
        "new": [answer.token_ids for answer in answers],
        "text": [answer.text for answer in answers],
        "text_ids": tokenizer.prompt_ids(None, "what is red?"),
        "text_new": text_answer.token_ids,
    }


def new_tokens(model, inputs, **options):
    """The generated ids, one tuple for each prompt."""
    tokens = model.generate(**inputs, **ENDLESS, **options)[:, inputs["input_ids"].shape[1] :]
    return [tuple(row) for row in tokens.tolist()]


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", ["hf_folder", "merged_folder"])
def test_same_logits_and_tokens(name, expected, load_hf, load_processor, request):
    folder = request.getfixturevalue(name)
    model, processor = load_hf(folder), load_processor(folder)
    assert type(model).__module__.startswith("transformers_modules")
    assert model.dtype == torch.float32
    inputs = [processor.apply_transcription_request(waveform) for waveform in WAVEFORMS]
    assert [part["num_audio_tokens"].tolist() for part in inputs] == [[3], [6], [15]]
    with torch.no_grad():
        for part, reference in zip(inputs, expected["logits"], strict=True):
            assert_close(model(**part).logits[0].numpy(), reference)
    assert [new_tokens(model, part)[0] for part in inputs] == expected["new"]
    batch = processor.apply_transcription_request(WAVEFORMS)
    assert new_tokens(model, batch) == expected["new"]
    assert new_tokens(model, batch, use_cache=False) == expected["new"]


def test_transcribe(expected, hf_folder, load_hf):
    """`transcribe` needs no processor; other tasks and instructions give other prompts."""
    model = load_hf(hf_folder)
    texts = [model.transcribe(waveform, **ENDLESS) for waveform in WAVEFORMS]
    assert texts == expected["text"]
    assert model.transcribe(WAVEFORM, "ast", **ENDLESS) != texts[1]
    assert model.transcribe(WAVEFORM, instruction="what is red?", **ENDLESS) != texts[1]


def test_the_default_limit_of_tokens_grows_with_the_audio(
    hf_folder, load_hf, load_processor, monkeypatch
):
    from transformers import GenerationMixin

    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **options: options)
    model, processor = load_hf(hf_folder), load_processor(hf_folder)
    for seconds, limit in ((1, 512), (80, 64 + 6 * 80)):
        inputs = processor.apply_transcription_request(np.zeros(16_000 * seconds, np.float32))
        assert model.generate(**inputs)["max_new_tokens"] == limit
        assert model.generate(**inputs, max_new_tokens=7)["max_new_tokens"] == 7
    assert "max_new_tokens" not in model.generate(input_ids=inputs["input_ids"])
    assert model.generation_config.max_new_tokens == 512


def test_prompts_without_audio_equal_the_language_model(
    workdir, expected, hf_folder, load_hf, load_processor
):
    """Bit for bit, also after a prompt with audio: LoRA is off."""
    from transformers import Qwen3ForCausalLM

    model, processor = load_hf(hf_folder), load_processor(hf_folder)
    base = Qwen3ForCausalLM.from_pretrained(workdir.parent / "llm")
    chat = [{"role": "user", "content": "what is red?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chat, **options)
    assert tuple(inputs["input_ids"][0].tolist()) == expected["text_ids"]
    with torch.no_grad():
        with_audio = model(**processor.apply_transcription_request(WAVEFORM)).logits
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
        again = model(**processor.apply_transcription_request(WAVEFORM)).logits
    assert torch.equal(with_audio, again)
    assert new_tokens(model, inputs) == [expected["text_new"]] == new_tokens(base, inputs)


def test_prompts_with_and_without_audio_in_one_batch(hf_folder, load_hf, load_processor):
    model, processor = load_hf(hf_folder), load_processor(hf_folder)
    inputs = processor(text=["<|AUDIO|> a", "what is red?"], audio=[WAVEFORM])
    with pytest.raises(ValueError, match="with and without audio in one batch"):
        model(**inputs)


def test_gradients_reach_the_hfq_former_and_lora(hf_folder, load_hf, load_processor):
    model, processor = load_hf(hf_folder), load_processor(hf_folder)
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name or (".hfq_former." in name and not name.endswith("positions"))
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    inputs = processor.apply_transcription_request(WAVEFORMS)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())


@pytest.mark.parametrize("padding", ["released", "whisper"])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.5, 4.007])
def test_features_equal_jax(padding, seconds):
    from fastslm_jax.convert.feature_extraction_fastslm import FastSLMFeatureExtractor

    waveform = checking.synthetic_signal(seconds)
    windows, frames = audio.WindowSpec(frames=100, padding=padding).cut(waveform)
    recording = np.zeros((1, len(windows)), np.int32)
    expected = log_mel.log_mel(windows[None], frames[None], recording, 16)[0]
    extractor = FastSLMFeatureExtractor(16, window_frames=100, audio_padding=padding)
    actual = extractor(waveform)["input_features"][0].T.reshape(expected.shape)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_unusable_audio(hf_folder, load_processor):
    extractor = load_processor(hf_folder).feature_extractor
    for samples in (SAMPLES, np.zeros((2, 100), np.float32)[None], np.full(100, np.nan)):
        with pytest.raises(ValueError, match="expected finite float samples"):
            extractor(samples)
    with pytest.raises(ValueError, match="8000 Hz, expected 16000"):
        extractor(WAVEFORM, sampling_rate=8000)


def test_peft_adapter_on_the_hugging_face_model(expected, workdir, convert, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import Qwen3ForCausalLM

    convert("export", f"--workdir={workdir}", "--layout=peft", f"--out={tmp_path / 'adapter'}")
    base = Qwen3ForCausalLM.from_pretrained(workdir.parent / "llm")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    given = opening.open_workdir(workdir)
    params = logits.materialize(given)
    embeddings = torch.from_numpy(
        np.array(logits.prompt_embeddings(given, params, WAVEFORM, expected["ids"]))
    )
    with torch.no_grad():
        actual = model(inputs_embeds=embeddings).logits[0].numpy()
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        new = model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert_close(actual, expected["logits"][1])
    assert tuple(new[0].tolist()) == expected["new"][1]
