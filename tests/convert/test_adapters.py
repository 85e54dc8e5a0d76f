"""Exports of the HFQ-Former's variants, and of other adapters."""

import types

import numpy as np
import pytest

from fastslm_jax import config as config_lib
from fastslm_jax.convert import checking, exporting, importing, logits, opening, stored
from fastslm_jax.data.prompts import PromptTokenizer
from fastslm_jax.errors import UserError


@pytest.mark.parametrize(
    "options",
    [
        {
            "stage_tokens": (4, 3, 3, 2),
            "detail_recovery_layers": 0,
            "downsample_factor": 3,
            "compressor_projections": True,
        },
        {"stage_tokens": (5,), "detail_recovery_layers": 1, "compression_size": 7},
    ],
    ids=["four scales", "one scale"],
)
def test_variants_of_the_hfq_former_give_the_same_logits_in_pytorch(
    options, make_workdir, load_hf, load_processor, tmp_path
):
    torch = pytest.importorskip("torch")
    given = opening.open_workdir(make_workdir(tmp_path, **options))
    ids = PromptTokenizer(given.load_tokenizer()).prompt_ids("asr")
    samples = checking.synthetic_signal(1.5)
    expected = logits.run_jax(given, samples, ids)
    exporting.export(given.path, tmp_path / "out", "hf")
    inputs = load_processor(tmp_path / "out").apply_transcription_request(samples)
    with torch.no_grad():
        actual = load_hf(tmp_path / "out")(**inputs).logits[0].numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    importing.import_checkpoint(tmp_path / "out", tmp_path / "in")
    again = opening.open_workdir(tmp_path / "in")
    np.testing.assert_array_equal(logits.run_jax(again, samples, ids), expected)


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"adapter": "sq_former"}, "hf", "adapter is sq_former and --layout=hf has hfq only$"),
        (
            {"adapter": "sq_former"},
            "released",
            "adapter is sq_former and --layout=released",
        ),
        (
            {"downsample_factor": 3},
            "released",
            "downsample_factor is 3 and --layout=released has 2 only; use --layout=hf$",
        ),
    ],
)
def test_what_a_layout_cannot_hold_is_one_line(options, layout, message):
    config = config_lib.full_size()
    config.model.update(options)
    given = types.SimpleNamespace(config=config, path="run")
    with pytest.raises(UserError, match=rf"^run: config\.model\.{message}"):
        stored.check_adapter(given, layout)


def test_another_adapter_has_only_its_lora_exported(make_workdir, tmp_path):
    """PEFT folders have the LoRA of the language model only."""
    workdir = make_workdir(tmp_path, adapter="sq_former")
    with pytest.raises(UserError, match="adapter is sq_former"):
        exporting.export(workdir, tmp_path / "out", "hf")
    exporting.export(workdir, tmp_path / "out", "peft")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
