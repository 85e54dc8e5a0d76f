"""Language models of other families than Qwen3: every format gives the same logits and weights."""

import json

import numpy as np
import pytest

from fastslm_jax.convert import checking, exporting, importing, logits, opening
from fastslm_jax.data.prompts import PromptTokenizer

TOLERANCE = 1e-4  # relative to the largest logit
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": {"model_type": "llama", "head_dim": 8, "rope_scaling": LLAMA3},
    "qwen2-untied": {"model_type": "qwen2", "head_dim": 8, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, make_workdir):
    """(working directory, samples, prompt ids, logits from JAX)."""
    workdir = make_workdir(tmp_path_factory.mktemp("family"), FAMILIES[request.param])
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
    import torch

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
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    given = opening.open_workdir(workdir)
    embeddings = logits.prompt_embeddings(given, logits.materialize(given), samples, ids)
    with torch.no_grad():
        actual = model(inputs_embeds=torch.from_numpy(np.array(embeddings))).logits[0].numpy()
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_the_imported_folder_names_the_family(family, tmp_path):
    workdir = family[0]
    exporting.export(workdir, tmp_path / "out", "released")
    importing.import_checkpoint(tmp_path / "out", tmp_path / "in")
    config = json.loads((tmp_path / "in/bases/llm/config.json").read_text())
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    assert config["architectures"] == [names[config["model_type"]]]
