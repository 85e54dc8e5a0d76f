"""An exported folder in programs that do not have this package: transformers, its pipeline, vLLM.

vLLM does not install here. What its transformers backend calls is tested one by one, as it calls it
(vllm/model_executor/models/transformers: multimodal.py, base.py, causal.py).
"""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile

from fastslm_jax.convert import checking

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

NEW_TOKENS = 8
WAVEFORMS = [checking.synthetic_signal(seconds) for seconds in (0.7, 2.5)]

ALONE = """
    import importlib.abc, json, sys

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("fastslm_jax", "jax", "flax"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocker())
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

    folder, file = sys.argv[1:]
    transcriber = pipeline("automatic-speech-recognition", folder, trust_remote_code=True)
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "audio", "path": file}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    print(json.dumps({
        "pipeline": transcriber(file, **options)["text"],
        "bytes": transcriber(open(file, "rb").read(), **options)["text"],
        "batch": [one["text"] for one in transcriber([file, file], batch_size=2, **options)],
        "chat": processor.decode(tokens, skip_special_tokens=True).strip(),
        "file": model.transcribe(file, **options),
    }))
"""


def test_without_this_package(hf_folder, load_hf, tmp_path):
    """A new process in which this package and JAX cannot be imported transcribes a file."""
    samples = np.round(32768 * WAVEFORMS[1]).astype(np.int16)
    file = tmp_path / "speech.wav"
    soundfile.write(file, samples, 16_000)
    code = textwrap.dedent(ALONE).replace("NEW_TOKENS", str(NEW_TOKENS))
    command = [sys.executable, "-I", "-W", "ignore", "-c", code, str(hf_folder), str(file)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "code")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    waveform = samples.astype(np.float32) / 32768
    expected = load_hf(hf_folder).transcribe(waveform, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    assert result == dict.fromkeys(("pipeline", "bytes", "chat", "file"), expected) | {
        "batch": [expected, expected]
    }


def test_a_missing_peft_is_an_error(hf_folder, load_hf, load_processor):
    """Without PEFT, transformers loads the base weights only and says nothing."""
    inputs = load_processor(hf_folder).apply_transcription_request(WAVEFORMS[0])
    model = type(load_hf(hf_folder))(load_hf(hf_folder).config)
    with pytest.raises(ImportError, match="pip install peft"):
        model(**inputs)


def test_audio_without_a_prompt_is_an_error(hf_folder, load_hf):
    """As the pipeline of transformers calls models that it does not know."""
    with pytest.raises(ValueError, match="needs a prompt"):
        load_hf(hf_folder)(input_features=torch.zeros(1, 16, 100))


def test_chat_template(hf_folder, load_processor):
    """A list of parts; the task of the turn is a variable of the template."""
    processor = load_processor(hf_folder)

    def render(*parts, **variables):
        chat = [{"role": "user", "content": list(parts)}]
        return processor.apply_chat_template(chat, **variables)

    audio, text = {"type": "audio"}, {"type": "text", "text": "Why?"}
    block = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    asr = f"<|ASR|>{block}\nTranscribe the audio clip into text."
    assert render(audio) == f"<|im_start|>user\n{asr}<|im_end|>\n"
    assert render(audio, text) == f"<|im_start|>user\n<|ASR|>{block}\nWhy?<|im_end|>\n"
    assert f"<|SQQA|>{block}\nWhy?" in render(text, audio, task="sqqa")
    assert f"<|AST|>{block}\nTranslate the audio clip into Korean." in render(audio, task="ast")
    assert render(text) == "<|im_start|>user\nWhy?<|im_end|>\n"
    with pytest.raises(ValueError, match=r"contains the control token <\|im_end\|>"):
        processor.apply_transcription_request(np.zeros(16_000, np.float32), prompt="a <|im_end|>")
    for wrong, message in (
        (lambda: render(audio, task="music"), "task music: expected one of asr, ast, ssum, sqqa"),
        (lambda: render({"type": "video"}), "content is video, expected audio or text"),
    ):
        with pytest.raises(Exception, match=message):
            wrong()


# ---- What vLLM calls ----


@pytest.fixture(scope="module")
def served(merged_folder):
    """The model as vLLM builds it: from the config, then the weights by name."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(merged_folder, trust_remote_code=True)
    model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True)
    weights = load_file(merged_folder / "model.safetensors")
    inside = {name.removeprefix("model."): value for name, value in weights.items()}
    parameters = dict(model.named_parameters())
    assert inside.keys() == parameters.keys()  # vLLM loads parameters, not buffers
    model.load_state_dict(inside)
    return model.eval()


def test_vllm_finds_the_parts(served):
    assert type(served).is_backend_compatible()
    assert served.get_decoder() is served.language_model
    assert served.get_encoder(modality="audio") is served.audio_tower
    assert served.get_input_embeddings() is served.language_model.embed_tokens
    assert served.config.get_text_config() is served.config.text_config
    assert served.config.audio_config.max_source_positions == 50
    assert served.config.tie_word_embeddings
    assert "language_model.layers.*.self_attn.q_proj" in served.tp_plan


def test_vllm_processes_audio(merged_folder, load_processor):
    """Prompts are located by offsets; every field has one row for each recording."""
    processor = load_processor(merged_folder)
    assert processor.feature_extractor.sampling_rate == 16_000
    text = " ".join([processor.audio_token] * 2)
    inputs = processor(
        text=text,
        audio=WAVEFORMS,
        return_text_replacement_offsets=True,
        return_tensors="pt",
        truncation=False,
        add_special_tokens=False,
    )
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["audio", "audio"]
    counts = [processor.tokenizer(entry["replacement"])["input_ids"] for entry in offsets]
    assert counts == [[processor.audio_token_id] * 3, [processor.audio_token_id] * 9]
    assert inputs["num_audio_tokens"].tolist() == [3, 9]
    assert inputs["input_features"].shape == (2, 16, 300)
    # Recordings of different lengths are then processed one by one, without padding.
    alone = processor(text=processor.audio_token, audio=[WAVEFORMS[0]])
    assert alone["input_features"].shape == (1, 16, 100)
    assert torch.equal(inputs["input_features"][0, :, :100], alone["input_features"][0])


def test_vllm_embeds_and_decodes(served, merged_folder, load_hf, load_processor):
    """Speech tokens in `pooler_output`, then hidden states from embeddings and positions."""
    processor, model = load_processor(merged_folder), load_hf(merged_folder)
    inputs = processor.apply_transcription_request(WAVEFORMS[1])
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        expected = model(**inputs).logits[0]
        speech = served.get_audio_features(inputs["input_features"], return_dict=True).pooler_output
        assert speech.shape == (9, 32)
        embeddings = served.get_input_embeddings()(ids)
        embeddings[ids == processor.audio_token_id] = speech
        hidden = served(
            input_ids=None,
            inputs_embeds=embeddings[None],
            use_cache=False,
            position_ids=torch.arange(len(ids))[None],
            return_dict=False,
        )[0][0, ...]
        torch.testing.assert_close(model.lm_head(hidden), expected, atol=1e-5, rtol=0)


def test_vllm_loads_the_adapter_by_name(hf_folder):
    """LoRA names are those of the modules that it adapts, after PEFT's prefix."""
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(hf_folder, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    for name in load_file(hf_folder / "adapter_model.safetensors"):
        module = name.removeprefix("base_model.model.model.").rsplit(".", 2)[0]
        assert isinstance(model.get_submodule(module), torch.nn.Linear)
