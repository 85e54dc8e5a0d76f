"""Fixtures of the planner tests: HLO text, and a tiny config whose base models have no weights."""

import json

import pytest
from ml_collections import ConfigDict

from fastslm_jax import config as config_lib

# In the style of the TPU compiler: a loop without an annotated trip count, an all-gather split over
# two fusions, and a reduce-scatter that is a fusion of an all-reduce and a slice.
HLO = """\
HloModule step, is_scheduled=true

%start (p: bf16[64,32]) -> (bf16[64,32], bf16[128,32]) {
  %p = bf16[64,32]{1,0} parameter(0)
  %ag.1 = bf16[128,32]{1,0} all-gather(%p), channel_id=7, replica_groups=MESH {'b'}, dimensions={0}
  ROOT %t = (bf16[64,32]{1,0}, bf16[128,32]{1,0}) tuple(%p, %ag.1)
}

%end (q: bf16[64,32]) -> bf16[128,32] {
  %q = bf16[64,32]{1,0} parameter(0)
  ROOT %ag.2 = bf16[128,32]{1,0:S(1)} all-gather(%q), channel_id=7, replica_groups=MESH {'b'}
}

%all-reduce-scatter.3 (r: f32[128]) -> f32[32] {
  %r = f32[128]{0} parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[128]{0} all-reduce(%r), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[32]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={32}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%condition (c: (s32[], bf16[64,32])) -> pred[] {
  %c = (s32[], bf16[64,32]{1,0}) parameter(0)
  %limit = s32[] constant(36)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%body (s: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %s = (s32[], bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = bf16[64,32]{1,0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %began = (bf16[64,32]{1,0}, bf16[128,32]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %whole = bf16[128,32]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%end
  %kernel = f32[4]{0} custom-call(%whole), custom_call_target="tpu_custom_call", metadata={a={
}}, metadata={op_name="over two lines"}
  ROOT %out = (s32[], bf16[64,32]{1,0}) tuple(%next, %w)
}

ENTRY %main (w0: bf16[64,32], g: f32[128]) -> f32[32] {
  %w0 = bf16[64,32]{1,0} parameter(0)
  %g = f32[128]{0} parameter(1)
  %first = s32[] constant(0)
  %state = (s32[], bf16[64,32]{1,0}) tuple(%first, %w0)
  %loop = (s32[], bf16[64,32]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %shard = f32[32]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
}
""".replace("MESH", "mesh['a'=2,'b'=2]")

WHISPER = {
    "model_type": "whisper",
    "d_model": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 256,
    "num_mel_bins": 16,
    "max_source_positions": 100,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def hlo_text() -> str:
    return HLO


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    """Windows of 2 s with 3 tokens; rows of 4 windows and 256 tokens."""
    config = config_lib.full_size()
    for name, sizes in (("whisper", WHISPER), ("llm", QWEN3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes))
        config.base[name] = str(tmp_path / name)
    config.model.update({"stage_tokens": (8,), "compression_size": 3, "detail_recovery_layers": 1})
    config.model.lora.rank = 4
    config.data.row.update({"windows": 4, "tokens": 256, "labels": 128})
    config.loss_chunk = 64
    config.global_batch_size = 8
    config.mesh.update({"data": -1, "fsdp": 2, "tensor": 1})
    return config
