"""The folders for PyTorch, loaded there: the same logits and the same greedy tokens as here; and `check` on all forms."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

from fastslm_jax.convert import checking, exporting, stored
from fastslm_jax.inference.generator import Generator, Request
from fastslm_jax.models import log_mel
from fastslm_jax.weights.tensors import SafetensorsSource, write_sharded

torch = pytest.importorskip("torch")
TOLERANCE = 1e-4  # of the largest logit
NEW_TOKENS = 24
SAMPLES = np.round(32768 * checking.synthetic_signal(2.5)).astype(np.int16)
WAVEFORM = SAMPLES.astype(np.float32) / 32768.0


@pytest.fixture(scope="module")
def here(workdir):
    """(prompt ids, logits, new tokens) of this package: with audio, and for a prompt of text alone."""
    given = stored.open_workdir(workdir)
    params = checking.materialize(given)
    encoder = checking.prompt_tokenizer(given)
    generator = Generator(given.model, params, encoder)
    encoder.end_id = -1  # decode all tokens
    ids = encoder.prompt_ids("asr")
    text_ids = encoder.prompt_ids(None, "what is red?")
    answer = generator.answer([Request(SAMPLES)], [NEW_TOKENS])[0].token_ids
    text_answer = generator.answer([Request(None, None, "what is red?")], [NEW_TOKENS])[0].token_ids
    return {
        "ids": ids,
        "logits": checking.run_jax(given, WAVEFORM, ids),
        "new": answer,
        "text_ids": text_ids,
        "text_new": text_answer,
    }


@pytest.fixture(scope="module")
def hf_folder(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "FastSLM"
    exporting.export(workdir, out, "hf")
    return out


@pytest.fixture(scope="module")
def merged_folder(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "Merged"
    exporting.export(workdir, out, "hf", merge_lora=True)
    return out


def load(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------------------- hf


@pytest.mark.parametrize("name", ["hf_folder", "merged_folder"])
def test_auto_model_gives_the_same_logits_and_tokens(name, here, request):
    model = load(request.getfixturevalue(name))
    assert type(model).__module__.startswith("transformers_modules")
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(torch.tensor(here["ids"]), torch.from_numpy(WAVEFORM)).logits[0].numpy()
    assert_close(logits, here["logits"])
    ids = model.generate_ids(
        model.prompt_ids("asr"), WAVEFORM, max_new_tokens=NEW_TOKENS, eos_token_id=None
    )
    assert tuple(ids.tolist()) == here["new"]
    text = model.transcribe(WAVEFORM, max_new_tokens=NEW_TOKENS)
    assert isinstance(text, str)


def test_text_prompts_run_with_lora_off(here, hf_folder):
    model = load(hf_folder)
    prompt = model.prompt_ids(None, "what is red?")
    assert tuple(prompt.tolist()) == here["text_ids"]
    ids = model.generate_ids(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    assert tuple(ids.tolist()) == here["text_new"]


def test_the_folder_is_whole(hf_folder):
    """Configuration, tokenizer, processor settings, card; nothing of this package is imported by its code."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    names = {path.name for path in hf_folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "generation_config.json",
    }
    code = (hf_folder / "modeling_fastslm.py").read_text()
    assert "jax" not in code.replace("fastslm_jax", "jax")
    tokenizer = AutoTokenizer.from_pretrained(hf_folder, trust_remote_code=True)
    assert tokenizer.convert_ids_to_tokens(list(range(300, 309)))[0] == "<|AUDIO|>"
    extractor = AutoFeatureExtractor.from_pretrained(hf_folder)
    assert (extractor.feature_size, extractor.hop_length, extractor.sampling_rate) == (
        16,
        160,
        16_000,
    )
    card = (hf_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "3 tokens of each 1 s" in card
    assert "LoRA of rank 4" in card


def test_whisper_padding_goes_with_the_folder(make_workdir, tmp_path):
    workdir = make_workdir(tmp_path / "small", audio_padding="whisper")
    exporting.export(workdir, tmp_path / "hf", "hf")
    given = stored.open_workdir(workdir)
    windows, frames = given.model.window.cut(WAVEFORM)
    expected = log_mel.log_mel(
        windows[None], frames[None], np.zeros((1, len(windows)), np.int32), 16
    )[0]
    np.testing.assert_allclose(
        load(tmp_path / "hf").windows(WAVEFORM).transpose(1, 2).numpy(), expected, atol=1e-4
    )


def test_shards_with_an_index(workdir, hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        exporting,
        "write_sharded",
        lambda folder, tensors: write_sharded(folder, tensors, max_bytes=200_000),
    )
    exporting.export(workdir, tmp_path / "hf", "hf")
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    whole = load_file(hf_folder / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert all((tmp_path / "hf" / name).stat().st_size < 220_000 for name in files)
    source = SafetensorsSource(tmp_path / "hf")
    assert all(np.array_equal(source.read(key), value) for key, value in whole.items())
    weights = load(tmp_path / "hf").hfq_former.projection.weight
    np.testing.assert_array_equal(weights.detach().numpy(), whole["hfq_former.projection.weight"])


def test_merging_in_float32_then_rounding_to_the_base_type():
    rng = np.random.default_rng(0)
    leaves = {
        "llm/layers/query/kernel": rng.normal(size=(2, 8, 6)).astype(np.float16),
        "llm/layers/query/lora_a": rng.normal(size=(2, 8, 3)).astype(np.float32),
        "llm/layers/query/lora_b": rng.normal(size=(2, 3, 6)).astype(np.float32),
    }
    (merged,) = stored.merge_lora(leaves, scale=2.0).values()
    kernel, lora_a, lora_b = leaves.values()
    expected = (kernel.astype(np.float32) + 2.0 * np.einsum("lir,lro->lio", lora_a, lora_b)).astype(
        np.float16
    )
    np.testing.assert_allclose(
        merged.read().astype(np.float32), expected.astype(np.float32), rtol=1e-3
    )
    assert merged.dtype == np.float16


@pytest.mark.parametrize("name", ["hf_folder", "merged_folder"])
def test_import_of_a_pytorch_folder(name, convert, request, tmp_path):
    folder = request.getfixturevalue(name)
    done = convert("import", f"--from={folder}", f"--out={tmp_path / 'in'}")
    assert done.code == 0, done.stderr
    assert done.json["layout"] == "hf"
    again = convert(
        "export", f"--workdir={tmp_path / 'in'}", "--layout=hf", f"--out={tmp_path / 'out'}"
    )
    assert again.code == 0, again.stderr
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)


# ----------------------------------------------------------------------------------------------------------------- peft


def test_peft_adapter_on_the_hugging_face_model(here, workdir, convert, tmp_path):
    import peft
    from transformers import Qwen3ForCausalLM

    done = convert(
        "export", f"--workdir={workdir}", "--layout=peft", f"--out={tmp_path / 'adapter'}"
    )
    assert done.code == 0, done.stderr
    base = Qwen3ForCausalLM.from_pretrained(workdir.parent / "llm")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    given = stored.open_workdir(workdir)
    embeddings = torch.from_numpy(checking.prompt_embeddings(given, WAVEFORM, here["ids"]))
    with torch.no_grad():
        logits = model(inputs_embeds=embeddings).logits[0].numpy()
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        new = model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert_close(logits, here["logits"])
    assert tuple(new[0].tolist()) == here["new"]


def test_lora_of_rank_0_has_no_adapter(make_workdir, convert, tmp_path):
    workdir = make_workdir(tmp_path / "small", lora={"rank": 0})
    for layout in ("peft", "released"):
        done = convert(
            "export", f"--workdir={workdir}", f"--layout={layout}", f"--out={tmp_path / 'out'}"
        )
        assert done.code == 2
        assert "has no LoRA" in done.stderr
    assert (
        convert("export", f"--workdir={workdir}", "--layout=hf", f"--out={tmp_path / 'out'}").code
        == 0
    )


# ---------------------------------------------------------------------------------------------------------------- check


def test_check_of_every_pair(convert, workdir, released, hf_folder, merged_folder):
    for first, second in (
        (workdir, released),
        (released / "model.safetensors", hf_folder),
        (workdir, merged_folder),
    ):
        done = convert("check", first, second)
        assert done.code == 0, done.stderr
        result = done.json
        assert (result["missing"], result["extra"], result["misshapen"]) == ([], [], [])
        assert result["max_abs_difference"] <= (0 if second is not merged_folder else 1e-6)
        assert result["max_abs_logit_difference"] <= TOLERANCE * result["max_abs_logit"]
        assert result["logits_by"] == ["jax", "jax" if second is released else "torch"]
        groups = [line.split()[0] for line in done.stdout.splitlines()[1:-2]]
        assert groups == ["encoder", "hfq_former", "llm"] + ["lora"] * (second is not merged_folder)


def test_check_names_what_differs(convert, workdir, released, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(released, changed)
    tensors = dict(load_file(released / "model.safetensors"))
    tensors["encoder.llm_proj.bias"] = tensors["encoder.llm_proj.bias"] + np.float32(0.25)
    save_file(tensors, changed / "model.safetensors")
    done = convert("check", workdir, changed, "--notorch")
    assert done.code == 0
    assert done.json["max_abs_difference"] == pytest.approx(0.25)
    assert done.json["max_abs_logit_difference"] > 0

    del tensors["encoder.stage1.conv1.bias"]
    tensors["encoder.llm_proj.scale"] = np.ones(2, np.float32)
    tensors["encoder.stage1.conv2.weight"] = np.zeros((64, 64), np.float32)
    save_file(tensors, changed / "model.safetensors")
    done = convert("check", released, changed)
    assert done.code == 2
    assert done.json["missing"] == ["encoder.stage1.conv1.bias"]
    assert done.json["extra"] == ["encoder.llm_proj.scale"]
    assert done.json["misshapen"] == ["encoder.stage1.conv2.weight"]
    assert done.json["max_abs_logit_difference"] is None
    assert f"tensor encoder.stage1.conv1.bias is missing from {changed} (1 such)" in done.stderr


def test_check_on_audio_of_ones_own(convert, workdir, hf_folder, tmp_path):
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 12_000), 16_000)
    done = convert("check", workdir, hf_folder, f"--audio={tmp_path / 'noise.wav'}", "--notorch")
    assert done.json["max_abs_logit_difference"] == 0
    assert done.json["logits_by"] == ["jax", "jax"]


def test_check_does_not_run_code_that_is_not_ours(convert, workdir, hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "hf")
    with open(tmp_path / "hf/modeling_fastslm.py", "a") as file:
        file.write(f"\nopen({str(tmp_path / 'was_run')!r}, 'w')\n")
    done = convert("check", workdir, tmp_path / "hf")
    assert done.json["logits_by"] == ["jax", "jax"]
    assert not (tmp_path / "was_run").exists()


# -------------------------------------------------------------------------------------------------------------- failures


def test_a_failed_export_leaves_nothing(convert, workdir, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(exporting, "model_card", fail)
    done = convert("export", f"--workdir={workdir}", "--layout=hf", f"--out={tmp_path / 'out'}")
    assert (done.code, done.stderr) == (2, "error: model.safetensors: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_pytorch_folder_is_refused(convert, hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "hf")
    config = json.loads((hf_folder / "config.json").read_text())
    for change, message in (
        (
            {"compression_size": 4},
            "semantic_distillation.query has shape (3, 64), the model's is (4, 64)",
        ),
        ({"lora_rank": 0}, "lora_A.weight has no place in this model (28 such)"),
        ({"stage_tokens": None}, "config.json: not as exported"),
    ):
        (tmp_path / "hf/config.json").write_text(json.dumps(config | change))
        done = convert("import", f"--from={tmp_path / 'hf'}", f"--out={tmp_path / 'in'}")
        assert done.code == 2
        assert message in done.stderr
