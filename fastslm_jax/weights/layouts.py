"""Parameter names in the checkpoints of other programs: {path in our tree: rule with their name}.

Linear kernels are [in, out] here and [out, in] in PyTorch. Convolution kernels are
[kernel, in, out] here and [out, in, kernel] in PyTorch.
"""

from fastslm_jax.weights.engine import Layout, Rule

_TRANSPOSE, _CONV = (1, 0), (2, 1, 0)

HF_WHISPER_IGNORED = (r"(model\.)?decoder\..*", r"proj_out\.weight")
RELEASED_LLM = "llm.base_model.model."  # PEFT's prefix inside the authors' module
HF_DECODER = "model.language_model."  # the decoder inside an exported PyTorch model

_QKVO = ("query", "key", "value", "out")
_DECODER_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LORA_TARGETS = tuple(name.split(".")[1] for name in _DECODER_PROJECTIONS.values())


def _linear(path: str, key: str, bias: bool = True) -> dict[str, Rule]:
    rules = {f"{path}/kernel": Rule(f"{key}.weight", _TRANSPOSE)}
    return rules | ({f"{path}/bias": Rule(f"{key}.bias")} if bias else {})


def _norm(path: str, key: str) -> dict[str, Rule]:
    return {f"{path}/scale": Rule(f"{key}.weight"), f"{path}/bias": Rule(f"{key}.bias")}


def _conv(path: str, key: str) -> dict[str, Rule]:
    return {f"{path}/kernel": Rule(f"{key}.weight", _CONV), f"{path}/bias": Rule(f"{key}.bias")}


def _attention(path: str, prefix: str, names: tuple[str, str, str, str]) -> dict[str, Rule]:
    query, key, value, out = names
    return {
        **_linear(f"{path}/query", f"{prefix}.{query}"),
        **_linear(f"{path}/key", f"{prefix}.{key}", bias=False),
        **_linear(f"{path}/value", f"{prefix}.{value}"),
        **_linear(f"{path}/out", f"{prefix}.{out}"),
    }


def hf_whisper(prefix: str = "model.encoder.") -> Layout:
    """Encoder of a Hugging Face Whisper; the prefix is that of WhisperForConditionalGeneration."""
    block = f"{prefix}layers.{{layer}}."
    attention = ("q_proj", "k_proj", "v_proj", "out_proj")
    return {
        **_conv("conv1", f"{prefix}conv1"),
        **_conv("conv2", f"{prefix}conv2"),
        "positions": Rule(f"{prefix}embed_positions.weight"),
        **_norm("layers/attention_norm", f"{block}self_attn_layer_norm"),
        **_attention("layers/attention", f"{block}self_attn", attention),
        **_norm("layers/mlp_norm", f"{block}final_layer_norm"),
        **_linear("layers/mlp_in", f"{block}fc1"),
        **_linear("layers/mlp_out", f"{block}fc2"),
        **_norm("final_norm", f"{prefix}layer_norm"),
    }


def hf_decoder(prefix: str = "", base: str = "", decoder: str = "model.") -> Layout:
    """Hugging Face's Qwen3, Qwen2 or Llama for causal language modeling.

    The decoder without its head is the submodule `decoder`. PEFT appends `base` (".base_layer") to
    the names of adapted layers. Norms of queries and keys and biases are in the files of some of
    these models only.
    """
    block = f"{prefix}{decoder}layers.{{layer}}."
    rules = {
        "embed_tokens": Rule(f"{prefix}{decoder}embed_tokens.weight"),
        "lm_head": Rule(f"{prefix}lm_head.weight"),
        "final_norm/scale": Rule(f"{prefix}{decoder}norm.weight"),
        "layers/attention_norm/scale": Rule(f"{block}input_layernorm.weight"),
        "layers/mlp_norm/scale": Rule(f"{block}post_attention_layernorm.weight"),
        "layers/query_norm/scale": Rule(f"{block}self_attn.q_norm.weight"),
        "layers/key_norm/scale": Rule(f"{block}self_attn.k_norm.weight"),
    }
    for ours, theirs in _DECODER_PROJECTIONS.items():
        has_bias = ours in ("query", "key", "value")
        rules |= _linear(f"layers/{ours}", f"{block}{theirs}{base}", bias=has_bias)
    return rules


def peft_lora(
    prefix: str = "base_model.model.", adapter: str = "", decoder: str = "model."
) -> Layout:
    """PEFT's LoRA. Names include `adapter` (".default") in a loaded model, but not in files."""
    rules = {}
    for ours, theirs in _DECODER_PROJECTIONS.items():
        key = f"{prefix}{decoder}layers.{{layer}}.{theirs}"
        rules[f"layers/{ours}/lora_a"] = Rule(f"{key}.lora_A{adapter}.weight", _TRANSPOSE)
        rules[f"layers/{ours}/lora_b"] = Rule(f"{key}.lora_B{adapter}.weight", _TRANSPOSE)
    return rules


def _compressor(path: str, key: str, names: tuple[str, ...], lead: int) -> dict[str, Rule]:
    query, query_positions, context_positions, query_norm, context_norm, out = names
    return {
        f"{path}/query": Rule(f"{key}.{query}", lead=lead),
        f"{path}/query_positions": Rule(f"{key}.{query_positions}"),
        f"{path}/context_positions": Rule(f"{key}.{context_positions}"),
        **_norm(f"{path}/query_norm", f"{key}.{query_norm}"),
        **_norm(f"{path}/context_norm", f"{key}.{context_norm}"),
        **_linear(f"{path}/out", f"{key}.{out}"),
    }


def _hf_compressor(name: str, key: str) -> dict[str, Rule]:
    """With the optional projections of queries, keys and values."""
    path = f"hfq_former/{name}"
    names = ("query", "query_positions", "context_positions", "query_norm", "context_norm", "out")
    rules = _compressor(path, key, names, lead=0)
    for part in ("query_projection", "key_projection", "value_projection"):
        rules |= _linear(f"{path}/{part}", f"{key}.{part}")
    return rules


def _downsampler(path: str, key: str, norm: str) -> dict[str, Rule]:
    return {
        **_conv(f"{path}/conv1", f"{key}.conv1"),
        **_conv(f"{path}/conv2", f"{key}.conv2"),
        **_norm(f"{path}/norm", f"{key}.{norm}"),
    }


def released(num_stages: int, detail_recovery_layers: int) -> Layout:
    """The authors' state_dict, for the whole parameter tree including its buffers (positions)."""
    block = "encoder.whisper.blocks.{layer}."
    names = ("query", "q_pos_embeds", "kv_pos_embeds", "q_ln", "kv_ln", "out_proj")
    rules = {
        **_conv("encoder/conv1", "encoder.whisper.conv1"),
        **_conv("encoder/conv2", "encoder.whisper.conv2"),
        "encoder/positions": Rule("encoder.whisper.positional_embedding"),
        **_norm("encoder/layers/attention_norm", f"{block}attn_ln"),
        **_attention("encoder/layers/attention", f"{block}attn", _QKVO),
        **_norm("encoder/layers/mlp_norm", f"{block}mlp_ln"),
        **_linear("encoder/layers/mlp_in", f"{block}mlp.0"),
        **_linear("encoder/layers/mlp_out", f"{block}mlp.2"),
        **_norm("encoder/final_norm", "encoder.whisper.ln_post"),
        **_compressor("hfq_former/semantic_distillation", "encoder.compressor", names, lead=1),
        **_linear("hfq_former/projection", "encoder.llm_proj"),
    }
    for stage in range(1, num_stages + 1):
        rules |= _compressor(
            f"hfq_former/compressor_{stage}", f"encoder.compressor{stage}", names, lead=1
        )
    for level in range(1, num_stages):
        rules |= _downsampler(f"hfq_former/downsampler_{level}", f"encoder.stage{level}", "ln_post")
    for layer in range(detail_recovery_layers):
        ours, theirs = f"hfq_former/detail_recovery_{layer}", f"encoder.out_attn.{layer}"
        attention = ("q", "k", "v", "out_proj")
        rules |= {
            **_attention(f"{ours}/self_attention", f"{theirs}.attn", attention),
            **_attention(f"{ours}/cross_attention", f"{theirs}.cross_attn", attention),
            **_norm(f"{ours}/self_norm", f"{theirs}.norm1"),
            **_norm(f"{ours}/cross_norm", f"{theirs}.norm2"),
        }
    llm = {
        **hf_decoder(RELEASED_LLM, base=".base_layer"),
        **peft_lora(RELEASED_LLM, adapter=".default"),
    }
    return rules | {f"llm/{path}": rule for path, rule in llm.items()}


def hf_fastslm(num_stages: int, detail_recovery_layers: int) -> Layout:
    """The PyTorch model of `convert/modeling_fastslm.py`, for the whole parameter tree.

    LoRA is in the folder's PEFT adapter, all else in the model's weights.
    """
    hfq_former = "model.hfq_former"
    llm = {**hf_decoder(decoder=HF_DECODER), **peft_lora(decoder=HF_DECODER)}
    rules = {
        **{f"encoder/{path}": rule for path, rule in hf_whisper("model.audio_tower.").items()},
        **{f"llm/{path}": rule for path, rule in llm.items()},
        **_hf_compressor("semantic_distillation", f"{hfq_former}.semantic_distillation"),
        **_linear("hfq_former/projection", f"{hfq_former}.projection"),
    }
    for stage in range(num_stages):
        rules |= _hf_compressor(f"compressor_{stage + 1}", f"{hfq_former}.compressors.{stage}")
    for level in range(num_stages - 1):
        rules |= _downsampler(
            f"hfq_former/downsampler_{level + 1}", f"{hfq_former}.downsamplers.{level}", "norm"
        )
    for layer in range(detail_recovery_layers):
        ours = f"hfq_former/detail_recovery_{layer}"
        theirs = f"{hfq_former}.detail_recovery.{layer}"
        for part in ("self", "cross"):
            rules |= _attention(f"{ours}/{part}_attention", f"{theirs}.{part}_attention", _QKVO)
            rules |= _norm(f"{ours}/{part}_norm", f"{theirs}.{part}_norm")
    return rules
