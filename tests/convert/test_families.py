"""Language models of other families than Qwen3: every format gives the same logits and weights."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fastslm_jax.convert import checking, exporting, importing, logits, opening
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.errors import UserError

TOLERANCE = 1e-4  # relative to the largest logit
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    # 300 tokens and no spare row: the nine added tokens need 320 rows.
    "no-spare-rows": {"model_type": "llama", "head_dim": 8, "vocab_size": 300},
    "no-spare-rows-untied": {"vocab_size": 305, "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "head_dim": 8, "rope_scaling": LLAMA3},
    "qwen2-untied": {"model_type": "qwen2", "head_dim": 8, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, make_workdir):
    """(working directory, samples, prompt ids, logits from JAX)."""
    workdir = make_workdir(tmp_path_factory.mktemp("family"), FAMILIES[request.param])
    assert opening.open_workdir(workdir).model.llm.vocab_size == 320
    given = opening.open_workdir(workdir)
    ids = PromptTokenizer(given.load_tokenizer()).prompt_ids("asr")
    samples = checking.synthetic_signal(1.5).astype(np.float32)
    return workdir, samples, ids, logits.run_jax(given, samples, ids)


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_imported_exports_are_bit_equal(family, layout, tmp_path):
    workdir, samples, ids, expected = family
    before = opening.open_workdir(workdir)
    exporting.export(workdir, tmp_path / "out", layout)
    importing.import_checkpoint(tmp_path / "out", tmp_path / "in")
    after = opening.open_workdir(tmp_path / "in")
    assert after.model.llm.rope == before.model.llm.rope
    for path, leaf in before.leaves.items():
        ours, again = (
            value.read() if hasattr(value, "read") else value
            for value in (leaf, after.leaves[path])
        )
        np.testing.assert_array_equal(ours, again, err_msg=path)
    np.testing.assert_array_equal(logits.run_jax(after, samples, ids), expected)


def test_pytorch_folder(family, load_hf, load_processor, tmp_path):
    workdir, samples, _, expected = family
    exporting.export(workdir, tmp_path / "hf", "hf")
    inputs = load_processor(tmp_path / "hf").apply_transcription_request(samples)
    with torch.no_grad():
        actual = load_hf(tmp_path / "hf")(**inputs).logits[0].numpy()
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_peft_adapter(family, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    workdir, samples, ids, expected = family
    exporting.export(workdir, tmp_path / "adapter", "peft")
    base = AutoModelForCausalLM.from_pretrained(workdir.parent / "llm")
    rows = base.get_input_embeddings().num_embeddings  # appended rows are not in the base
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    given = opening.open_workdir(workdir)
    embeddings = logits.prompt_embeddings(given, logits.materialize(given), samples, ids)
    with torch.no_grad():
        actual = model(inputs_embeds=torch.from_numpy(np.array(embeddings))).logits[0].numpy()
    assert np.abs(actual - expected[:, :rows]).max() <= TOLERANCE * np.abs(expected).max()


def test_the_imported_folder_names_the_family(family, tmp_path):
    workdir = family[0]
    exporting.export(workdir, tmp_path / "out", "released")
    importing.import_checkpoint(tmp_path / "out", tmp_path / "in")
    config = json.loads((tmp_path / "in/bases/llm/config.json").read_text())
    names = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    assert config["architectures"] == [names[config["model_type"]]]


def test_appended_rows_are_the_mean(family):
    given = opening.open_workdir(family[0])
    base = AutoModel.from_pretrained(family[0].parent / "llm")
    table = base.get_input_embeddings().weight.detach().numpy()
    ours = given.leaves["llm/embed_tokens"].read()
    assert ours.shape == (320, 32)
    np.testing.assert_array_equal(ours[: len(table)], table)
    mean = table.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(ours[len(table) :], np.tile(mean, (320 - len(table), 1)), atol=1e-7)


def test_a_released_model_with_appended_rows_and_the_base_folder(family, tmp_path):
    """As the authors publish it: weights without config.json, and --llm."""
    workdir, samples, ids, expected = family
    exporting.export(workdir, tmp_path / "out", "released")
    (tmp_path / "out/config.json").unlink()
    importing.import_checkpoint(
        tmp_path / "out/model.safetensors",
        tmp_path / "in",
        llm=str(workdir.parent / "llm"),
        lora_alpha=8.0,
    )
    again = opening.open_workdir(tmp_path / "in")
    np.testing.assert_array_equal(logits.run_jax(again, samples, ids), expected)


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_shorter_windows_are_exported_with_their_sizes(
    layout, make_workdir, load_hf, load_processor, tmp_path
):
    """Windows of 0.6 s with one token, of an encoder with windows of 1 s."""
    workdir = make_workdir(tmp_path, window_seconds=0.6, compression_size=0)
    given = opening.open_workdir(workdir)
    assert (given.model.window.seconds, given.model.tokens_per_window) == (0.6, 1)
    assert given.leaves["encoder/positions"].shape == (30, 64)
    ids = PromptTokenizer(given.load_tokenizer()).prompt_ids("asr")
    samples = checking.synthetic_signal(1.5).astype(np.float32)
    expected = logits.run_jax(given, samples, ids)
    assert len(expected) == len(ids) + 2  # three windows
    exporting.export(workdir, tmp_path / "out", layout)
    importing.import_checkpoint(tmp_path / "out", tmp_path / "in")
    again = opening.open_workdir(tmp_path / "in")
    assert again.model.window == given.model.window
    np.testing.assert_array_equal(logits.run_jax(again, samples, ids), expected)
    if layout == "hf":
        inputs = load_processor(tmp_path / "out").apply_transcription_request(samples)
        with torch.no_grad():
            actual = load_hf(tmp_path / "out")(**inputs).logits[0].numpy()
        assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("seconds", [1.02, 0.61, 30.0, 0.001])
def test_impossible_windows(seconds, make_workdir, tmp_path):
    message = rf"window_seconds={seconds:g}: should be a multiple of 0\.02 s and at most 1 s"
    with pytest.raises(UserError, match=message):
        make_workdir(tmp_path, window_seconds=seconds)


def test_a_tokenizer_without_a_chat_template(make_workdir, load_hf, load_processor, tmp_path):
    """The named template is used, and exported with the tokenizer."""
    workdir = make_workdir(tmp_path, chat_template="chatml")
    (tmp_path / "llm/chat_template.jinja").unlink()
    given = opening.open_workdir(workdir)
    ids = PromptTokenizer(given.load_tokenizer()).prompt_ids("asr")
    exporting.export(workdir, tmp_path / "released", "released")
    importing.import_checkpoint(tmp_path / "released", tmp_path / "in")
    again = opening.open_workdir(tmp_path / "in")
    assert PromptTokenizer(again.load_tokenizer()).prompt_ids("asr") == ids
    exporting.export(workdir, tmp_path / "hf", "hf")
    samples = checking.synthetic_signal(0.7).astype(np.float32)
    inputs = load_processor(tmp_path / "hf").apply_transcription_request(samples)
    tokens = inputs["input_ids"][0].tolist()
    assert len(tokens) == len(ids) + 2  # three speech tokens for one <|AUDIO|>
    assert (tokens[:3], tokens[-8:]) == (list(ids[:3]), list(ids[-8:]))


@pytest.mark.parametrize(("exported", "expected"), [("released/tokenizer", [2, 0]), ("hf", [2, 0])])
def test_all_ids_that_end_an_answer_are_exported(exported, expected, make_workdir, tmp_path):
    workdir = make_workdir(tmp_path)
    ends = json.dumps({"eos_token_id": [0, 2]})
    (tmp_path / "llm/generation_config.json").write_text(ends)
    layout = exported.partition("/")[0]
    exporting.export(workdir, tmp_path / layout, layout)
    written = json.loads((tmp_path / exported / "generation_config.json").read_text())
    assert written["eos_token_id"] == expected
    importing.import_checkpoint(tmp_path / layout, tmp_path / "in")
    again = PromptTokenizer(opening.open_workdir(tmp_path / "in").load_tokenizer())
    assert again.end_ids == (2, 0)
