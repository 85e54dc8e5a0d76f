"""Shapes of the full-size model: speech tokens per recording and parameter counts."""

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from fastslm_jax.models.adapters import HFQFormer
from fastslm_jax.models.decoder import Decoder
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.models.lora import LoRA
from fastslm_jax.models.whisper import WhisperEncoder

# Encoder of Whisper-large-v3.
D, MELS, POSITIONS, LAYERS = 1280, 128, 1500, 32
# Qwen3-4B.
LLM_D, LLM_LAYERS, VOCAB, MLP = 2560, 36, 151_936, 9728
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RANK = 16


@pytest.fixture(scope="module")
def full() -> FastSLM:
    """Whisper-large-v3, HFQ-Former with 80 + 80 + 80 → 50 tokens, Qwen3-4B with rank-16 LoRA."""
    return FastSLM(
        encoder=WhisperEncoder(
            D, LAYERS, num_heads=20, mlp_dim=4 * D, num_mels=MELS, max_positions=POSITIONS
        ),
        adapter=HFQFormer(
            LLM_D, stage_tokens=(80, 80, 80), compression_size=50, detail_recovery_layers=2
        ),
        llm=Decoder(VOCAB, LLM_D, LLM_LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, lora=LoRA(RANK)),
    )


@pytest.fixture(scope="module")
def tree(full):
    return jax.eval_shape(full.init, jax.random.key(0))


def count(tree, keep=lambda path: True) -> int:
    return sum(leaf.size for path, leaf in flatten_dict(tree, sep="/").items() if keep(path))


def is_fixed(path: str) -> bool:
    """Position tables are parameters, but never trained."""
    return path.endswith("positions")


def test_thirty_seconds_are_fifty_tokens(full, tree):
    def features_and_tokens(params, mel):
        features = full.encoder.apply({"params": params["encoder"]}, mel)
        return features, *full.adapter.apply(
            {"params": params["hfq_former"]}, features, mutable="intermediates"
        )

    features, tokens, state = jax.eval_shape(features_and_tokens, tree, jnp.zeros((1, 3000, MELS)))
    assert features.shape == (1, 1500, 1280)
    assert {name: value[0].shape[1:] for name, value in state["intermediates"].items()} == {
        "stage1_features": (750, 1280),
        "stage2_features": (375, 1280),
        "stage1_tokens": (80, 1280),
        "stage2_tokens": (80, 1280),
        "stage3_tokens": (80, 1280),
        "semantic_tokens": (50, 1280),
        "detail_recovery_0_tokens": (50, 1280),
        "detail_recovery_1_tokens": (50, 1280),
    }
    assert tokens.shape == (1, 50, 2560)


@pytest.mark.parametrize(("minutes", "tokens"), [(0.5, 50), (5, 500), (8 * 60, 48_000)])
def test_tokens_of_a_recording(full, tree, minutes, tokens):
    windows = full.window.count(round(60 * minutes * 16_000))
    audio = jax.ShapeDtypeStruct((1, windows, full.window.samples + 400), jnp.int16)
    slots = jax.ShapeDtypeStruct((1, windows), jnp.int32)
    assert jax.eval_shape(full.speech_tokens, tree, audio, slots, slots).shape == (1, tokens, 2560)
    assert full.window.seconds == 30.0


def test_whisper_large_v3_encoder_has_637_million(tree):
    convolutions = (3 * MELS * D + D) + (3 * D * D + D)
    attention = 4 * D * D + 3 * D  # the key has no bias
    mlp = 2 * (4 * D * D) + 4 * D + D
    block = attention + mlp + 2 * (2 * D)
    expected = convolutions + POSITIONS * D + LAYERS * block + 2 * D
    assert count(tree["encoder"]) == expected == 636_968_960  # including the position table


def test_hfq_former_has_56_million_and_4_million_fixed(tree):
    compressors = 4 * ((D * D + D) + 2 * (2 * D))  # output projection and two norms
    queries = (3 * 80 + 50) * D
    downsamplers = 2 * (2 * (3 * D * D + D) + 2 * D)
    detail_recovery = 2 * (2 * (4 * D * D + 3 * D) + 2 * (2 * D))
    projection = D * LLM_D + LLM_D
    trained = compressors + queries + downsamplers + detail_recovery + projection
    position_tables = (3 * 80 + 50) * D + (1500 + 750 + 375 + 3 * 80) * D
    assert count(tree["hfq_former"], lambda path: not is_fixed(path)) == trained == 56_140_800
    assert count(tree["hfq_former"], is_fixed) == position_tables == 4_038_400


def is_lora(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))


def test_qwen3_4b_has_4_billion(tree):
    attention = 2 * LLM_D * HEADS * HEAD_DIM + 2 * LLM_D * KV_HEADS * HEAD_DIM
    norms = 2 * LLM_D + 2 * HEAD_DIM
    block = attention + 3 * LLM_D * MLP + norms
    expected = VOCAB * LLM_D + LLM_LAYERS * block + LLM_D  # tied embeddings
    assert count(tree["llm"], lambda path: not is_lora(path)) == expected == 4_022_468_096


def test_lora_has_33_million(tree):
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    ins_and_outs = (LLM_D + q) + 2 * (LLM_D + kv) + (q + LLM_D) + 2 * (LLM_D + MLP) + (MLP + LLM_D)
    assert count(tree["llm"], is_lora) == LLM_LAYERS * RANK * ins_and_outs == 33_030_144


def test_a_cached_token_takes_144_kibibytes_in_bfloat16(full):
    cache = jax.eval_shape(lambda: full.llm.init_cache(1, 1, jnp.bfloat16))
    assert sum(part.size * part.dtype.itemsize for part in (cache.keys, cache.values)) == 144 * 1024
