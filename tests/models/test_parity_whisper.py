"""Whisper encoder against `transformers` on a small random model: layers, output, and export."""

import copy

import jax
import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from fastslm_jax.models.whisper import EncoderBlock
from fastslm_jax.weights import engine, layouts, pretrained

# Tolerances, relative to the largest value.
LAYER_TOLERANCE, MODEL_TOLERANCE = 1e-5, 1e-4


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Randomizes all parameters, including biases and norms, so that no mapping error is hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "embed_positions" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                is_scale = "norm" in name and name.endswith("weight")
                parameter.copy_(1 + 0.2 * noise if is_scale else 0.15 * noise)


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(transformers model, its folder, our encoder, our parameters)."""
    config = WhisperConfig(
        d_model=48,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=80,
        num_mel_bins=20,
        max_source_positions=30,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=60,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    randomize(model, seed=0)
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    encoder = pretrained.whisper_from_config(pretrained.read_config(folder))
    tree = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 60, 20), np.float32))[
        "params"
    ]
    return model, folder, encoder, pretrained.load_whisper(folder, tree)


def test_sizes_follow_config_json(reference):
    _, _, encoder, params = reference
    sizes = (
        encoder.width,
        encoder.num_layers,
        encoder.num_heads,
        encoder.mlp_dim,
        encoder.num_mels,
        encoder.max_positions,
    )
    assert sizes == (48, 2, 3, 80, 20, 30)
    assert params["layers"]["mlp_in"]["kernel"].shape == (2, 48, 80)


def test_layer(reference):
    model, _, encoder, params = reference
    x = np.random.default_rng(0).normal(size=(2, 30, 48)).astype(np.float32)
    apply = jax.jit(EncoderBlock(encoder.num_heads, encoder.mlp_dim, encoder.max_positions).apply)
    for number, layer in enumerate(model.model.encoder.layers):
        actual, _ = apply(
            {"params": jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])}, x
        )
        with torch.no_grad():
            assert_close(actual, layer(torch.from_numpy(x), None), LAYER_TOLERANCE)


def test_encoder_output(reference):
    model, _, encoder, params = reference
    mel = np.random.default_rng(1).normal(size=(3, 60, 20)).astype(np.float32)
    actual = jax.jit(encoder.apply)({"params": params}, mel)
    with torch.no_grad():
        expected = model.model.encoder(torch.from_numpy(mel).transpose(1, 2)).last_hidden_state
    assert_close(actual, expected, MODEL_TOLERANCE)


@pytest.mark.parametrize("positions", [1, 7, 20, 29])
def test_shorter_windows_have_the_first_positions(reference, positions):
    """As `transformers` with cut position embeddings."""
    model, folder, encoder, params = reference
    cut = encoder.clone(max_positions=positions)
    mel = np.random.default_rng(2).normal(size=(2, 2 * positions, 20)).astype(np.float32)
    tree = jax.eval_shape(cut.init, jax.random.key(0), mel)["params"]
    loaded = pretrained.load_whisper(folder, tree, cut_positions=30 - positions)
    np.testing.assert_array_equal(loaded["positions"], params["positions"][:positions])
    theirs = copy.deepcopy(model.model.encoder)
    theirs.config.max_source_positions = theirs.max_source_positions = positions
    table = theirs.embed_positions.weight[:positions]
    theirs.embed_positions = torch.nn.Embedding.from_pretrained(table)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(mel).transpose(1, 2)).last_hidden_state
    assert_close(jax.jit(cut.apply)({"params": loaded}, mel), expected, MODEL_TOLERANCE)


def test_round_trip_is_bit_equal(reference):
    model, _, _, params = reference
    theirs = {
        key: value.numpy()
        for key, value in model.state_dict().items()
        if key.startswith("model.encoder.")
    }
    ours = dict(engine.store(params, layouts.hf_whisper()))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_wrong_number_of_frames_raises(reference):
    _, _, encoder, params = reference
    with pytest.raises(ValueError, match=r"\(59, 20\); this encoder takes \(60, 20\)"):
        encoder.apply({"params": params}, np.zeros((1, 59, 20), np.float32))
