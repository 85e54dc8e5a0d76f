"""PyTorch folders and PEFT adapters give the same logits and greedy tokens as JAX."""

import numpy as np
import pytest

from fastslm_jax.convert import checking, exporting, logits, opening
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.inference.generator import Generator, Request
from fastslm_jax.models import log_mel

torch = pytest.importorskip("torch")
TOLERANCE = 1e-4  # relative to the largest logit
NEW_TOKENS = 24
SAMPLES = np.round(32768 * checking.synthetic_signal(2.5)).astype(np.int16)
WAVEFORM = SAMPLES.astype(np.float32) / 32768.0


@pytest.fixture(scope="module")
def expected(workdir):
    """Prompt ids, logits and new tokens from JAX, for a prompt with audio and one without."""
    given = opening.open_workdir(workdir)
    tokenizer = PromptTokenizer(given.load_tokenizer())
    generator = Generator(given.model, logits.materialize(given), tokenizer)
    tokenizer.end_id = -1  # never stop early
    ids = tokenizer.prompt_ids("asr")
    text_ids = tokenizer.prompt_ids(None, "what is red?")
    requests = [
        Request(SAMPLES, max_new_tokens=NEW_TOKENS),
        Request(None, None, "what is red?", max_new_tokens=NEW_TOKENS),
    ]
    answer, text_answer = generator.answer(requests)
    return {
        "ids": ids,
        "logits": logits.run_jax(given, WAVEFORM, ids),
        "new": answer.token_ids,
        "text_ids": text_ids,
        "text_new": text_answer.token_ids,
    }


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", ["hf_folder", "merged_folder"])
def test_auto_model_gives_the_same_logits_and_tokens(name, expected, load_hf, request):
    model = load_hf(request.getfixturevalue(name))
    assert type(model).__module__.startswith("transformers_modules")
    assert model.dtype == torch.float32
    with torch.no_grad():
        output = model(torch.tensor(expected["ids"]), torch.from_numpy(WAVEFORM))
    assert_close(output.logits[0].numpy(), expected["logits"])
    ids = model.generate_ids(
        model.prompt_ids("asr"), WAVEFORM, max_new_tokens=NEW_TOKENS, eos_token_id=None
    )
    assert tuple(ids.tolist()) == expected["new"]
    text = model.transcribe(WAVEFORM, max_new_tokens=NEW_TOKENS)
    assert isinstance(text, str)


def test_lora_is_off_for_text_prompts(expected, hf_folder, load_hf):
    model = load_hf(hf_folder)
    prompt = model.prompt_ids(None, "what is red?")
    assert tuple(prompt.tolist()) == expected["text_ids"]
    ids = model.generate_ids(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    assert tuple(ids.tolist()) == expected["text_new"]


def test_whisper_padding(make_workdir, load_hf, tmp_path):
    workdir = make_workdir(tmp_path / "small", audio_padding="whisper")
    exporting.export(workdir, tmp_path / "hf", "hf")
    given = opening.open_workdir(workdir)
    windows, frames = given.model.window.cut(WAVEFORM)
    recording = np.zeros((1, len(windows)), np.int32)
    expected = log_mel.log_mel(windows[None], frames[None], recording, 16)[0]
    actual = load_hf(tmp_path / "hf").windows(WAVEFORM).transpose(1, 2).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)


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
    assert_close(actual, expected["logits"])
    assert tuple(new[0].tolist()) == expected["new"]
