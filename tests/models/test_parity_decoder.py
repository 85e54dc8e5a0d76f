"""Qwen3, Qwen2 and Llama against `transformers`, LoRA against PEFT: small random models."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fastslm_jax.models.attention import CausalSegments
from fastslm_jax.models.decoder import DecoderBlock, RoPE
from fastslm_jax.models.lora import LoRA
from fastslm_jax.weights import engine, layouts, pretrained
from fastslm_jax.weights.tensors import SafetensorsSource

# Tolerances, relative to the largest value.
LAYER_TOLERANCE, MODEL_TOLERANCE = 1e-5, 1e-4
VOCABULARY, NATIVE_CONTEXT, LENGTH = 97, 32, 100
SIZES = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": NATIVE_CONTEXT,
}
# All wavelengths but the two shortest are scaled or blended at these lengths.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": NATIVE_CONTEXT,
}


def plain(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


CASES = {  # family, heads, key-value heads, tied, rope
    "qwen3-gqa1-tied": ("qwen3", 4, 4, True, plain(1e6)),
    "qwen3-gqa2-untied": ("qwen3", 4, 2, False, plain(5e6)),
    "qwen3-gqa4-tied": ("qwen3", 4, 1, True, plain(1e4)),
    "qwen3-gqa2-tied-yarn": ("qwen3", 4, 2, True, YARN),
    "qwen2-gqa2-tied": ("qwen2", 4, 2, True, plain(1e6)),
    "qwen2-gqa4-untied-yarn": ("qwen2", 4, 1, False, YARN),
    "llama-gqa2-tied-llama3": ("llama", 4, 2, True, LLAMA3),
    "llama-gqa1-untied-llama3": ("llama", 4, 4, False, LLAMA3),
    "smollm2": ("llama", 3, 1, True, plain(1e5)),
}


def make_reference(folder, family: str, heads: int, kv_heads: int, tied: bool, rope: dict):
    """A random model of `transformers`, which is also saved to the folder."""
    # Only Qwen3's head dimension may differ from width / heads.
    widths = (
        {"hidden_size": 48, "head_dim": 16} if family == "qwen3" else {"hidden_size": 16 * heads}
    )
    config = AutoConfig.for_model(
        family,
        **SIZES,
        **widths,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_parameters=dict(rope),
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model, seed=1)
    model.save_pretrained(folder)
    return model


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def shapes_of(llm):
    return jax.eval_shape(
        llm.init, jax.random.key(0), jnp.zeros((1, 2, llm.width)), jnp.zeros((1, 2), jnp.int32)
    )["params"]


@functools.partial(jax.jit, static_argnames="llm")
def run(llm, params, tokens, position_ids, segment_ids, lora_gate):
    embeddings = llm.apply({"params": params}, tokens, method="embed")
    hidden, _ = llm.apply({"params": params}, embeddings, position_ids, segment_ids, lora_gate)
    return llm.apply({"params": params}, hidden, method="logits")


def our_logits(llm, params, tokens, position_ids=None, segment_ids=None, lora_gate=1.0):
    """tokens [b, t] → logits [b, t, v]. All tests of a model share one compiled shape."""
    position_ids = (
        np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if position_ids is None
        else position_ids
    )
    segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    gate = np.full((len(tokens), 1), lora_gate, np.float32)
    return np.asarray(
        run(llm, params, tokens, position_ids.astype(np.int32), segment_ids.astype(np.int32), gate)
    )


def their_logits(model, tokens, **inputs):
    with torch.no_grad():
        inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
        return model(
            input_ids=torch.from_numpy(np.asarray(tokens, np.int64)), **inputs
        ).logits.numpy()


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape, dtype=np.int32)


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def reference(request, tmp_path_factory):
    """(transformers model, our decoder, our parameters)."""
    folder = tmp_path_factory.mktemp("reference")
    model = make_reference(folder, *CASES[request.param])
    llm = pretrained.decoder_from_config(pretrained.read_config(folder))
    return model, llm, pretrained.load_decoder(folder, shapes_of(llm))


def test_layer(reference):
    model, llm, params = reference
    x = np.random.default_rng(0).normal(size=(2, 40, llm.width)).astype(np.float32)
    position_ids = np.broadcast_to(np.arange(40), (2, 40))
    causal = CausalSegments()
    block = DecoderBlock(
        llm.num_heads,
        llm.num_kv_heads,
        llm.head_dim,
        llm.mlp_dim,
        llm.rope,
        llm.epsilon,
        LoRA(),
        deterministic=True,
        qk_norm=llm.qk_norm,
        qkv_bias=llm.qkv_bias,
    )
    apply = jax.jit(block.apply)
    for number, layer in enumerate(model.model.layers):
        variables = {
            "params": jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
        }
        (actual, _), _ = apply(variables, (x, None), position_ids, causal, None)
        with torch.no_grad():
            hidden = torch.from_numpy(x)
            rotations = model.model.rotary_emb(hidden, torch.from_numpy(position_ids.copy()))
            assert_close(
                actual,
                layer(hidden, attention_mask=None, position_embeddings=rotations),
                LAYER_TOLERANCE,
            )


def test_logits(reference):
    """The length is three times the native context of the YaRN case."""
    model, llm, params = reference
    assert LENGTH > 3 * NATIVE_CONTEXT
    tokens = random_tokens(2, LENGTH)
    assert_close(our_logits(llm, params, tokens), their_logits(model, tokens), MODEL_TOLERANCE)


def test_left_padded_input(reference):
    """transformers pads on the left for generation; we give the padding its own segment id."""
    model, llm, params = reference
    mask = np.arange(LENGTH) >= np.array([[0], [37]])
    tokens = np.where(mask, random_tokens(2, LENGTH), 0).astype(np.int32)
    position_ids = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    theirs = their_logits(
        model, tokens, attention_mask=mask.astype(np.int64), position_ids=position_ids
    )
    ours = our_logits(llm, params, tokens, position_ids, mask)
    assert_close(ours[mask], theirs[mask], MODEL_TOLERANCE)


def test_packed_input(reference):
    """Rows of three and of two packed examples match the examples run separately."""
    model, llm, params = reference
    rows = [
        [random_tokens(1, length, seed=length) for length in lengths]
        for lengths in ((7, 60, 33), (48, 52))
    ]
    tokens = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    segment_ids = [
        [np.full(part.shape[1], number + 1) for number, part in enumerate(row)] for row in rows
    ]
    position_ids = [[np.arange(part.shape[1]) for part in row] for row in rows]
    segment_ids, position_ids = (
        np.stack([np.concatenate(row) for row in ids]) for ids in (segment_ids, position_ids)
    )
    alone = np.concatenate(
        [np.concatenate([their_logits(model, part) for part in row], axis=1) for row in rows]
    )
    assert_close(our_logits(llm, params, tokens, position_ids, segment_ids), alone, MODEL_TOLERANCE)


def test_round_trip_is_bit_equal(reference):
    model, llm, params = reference
    theirs = {key: value.numpy() for key, value in model.state_dict().items()}
    if llm.tied_embeddings:
        assert "lm_head" not in params
        del theirs["lm_head.weight"]
    ours = dict(engine.store(params, layouts.hf_decoder()))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_llama3_scaling_matters(tmp_path):
    """The plain embedding gives other logits than that of type llama3."""
    model = make_reference(tmp_path, *CASES["llama-gqa2-tied-llama3"])
    llm = pretrained.decoder_from_config(pretrained.read_config(tmp_path))
    params = pretrained.load_decoder(tmp_path, shapes_of(llm))
    tokens, plain_llm = random_tokens(2, LENGTH), llm.clone(rope=RoPE(theta=5e5))
    difference = our_logits(plain_llm, params, tokens) - their_logits(model, tokens)
    assert np.abs(difference).max() > 0.1


@pytest.fixture(scope="module", params=["qwen3-gqa2-untied", "qwen2-gqa2-tied", "smollm2"])
def adapted(request, tmp_path_factory):
    """(PEFT model, our LoRA parameters, our decoder, all our parameters, base model)."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("base")
    base = make_reference(folder, *CASES[request.param])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = peft.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(copy.deepcopy(base), options).eval()
    randomize_lora(model)
    adapter = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(adapter)

    llm = pretrained.decoder_from_config(
        pretrained.read_config(folder), lora=LoRA(rank=4, alpha=16.0)
    )
    shapes = engine.flatten(shapes_of(llm))
    is_lora = {path: path.endswith(("lora_a", "lora_b")) for path in shapes}
    params = pretrained.load_decoder(
        folder, engine.unflatten({path: leaf for path, leaf in shapes.items() if not is_lora[path]})
    )
    lora_tree = engine.unflatten({path: leaf for path, leaf in shapes.items() if is_lora[path]})
    lora = engine.load(
        SafetensorsSource(adapter / "adapter_model.safetensors"), layouts.peft_lora(), lora_tree
    )
    return model, lora, llm, engine.unflatten(engine.flatten(params) | engine.flatten(lora)), base


def randomize_lora(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_peft_lora_logits(adapted):
    model, _, llm, params, base = adapted
    tokens = random_tokens(2, LENGTH)
    expected = their_logits(model, tokens)
    assert np.abs(expected - their_logits(base, tokens)).max() > 0.1
    assert_close(our_logits(llm, params, tokens), expected, MODEL_TOLERANCE)


def test_disabled_lora_matches_the_base_model(adapted):
    _, _, llm, params, base = adapted
    tokens = random_tokens(2, LENGTH)
    assert_close(
        our_logits(llm, params, tokens, lora_gate=0.0), their_logits(base, tokens), MODEL_TOLERANCE
    )


def test_peft_round_trip_is_bit_equal(adapted, tmp_path):
    import peft

    model, lora, *_ = adapted
    theirs = {
        key: value.detach().numpy() for key, value in peft.get_peft_model_state_dict(model).items()
    }
    ours = dict(engine.store(lora, layouts.peft_lora()))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    save_file(ours, tmp_path / "adapter.safetensors")
    reloaded = engine.load(
        SafetensorsSource(tmp_path / "adapter.safetensors"),
        layouts.peft_lora(),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lora),
    )
    jax.tree.map(np.testing.assert_array_equal, reloaded, lora)
