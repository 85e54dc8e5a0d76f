"""The names of every parameter in the layouts that other programs write.

Left: a path in our tree. Right: the tensor's name there. Linear kernels are transposed ([in, out] here, [out, in] in
PyTorch), convolutions are [kernel, in, out] here and [out, in, kernel] there.
"""

from fastslm_jax.weights.engine import Layout, Rule

_TRANSPOSE, _CONV = (1, 0), (2, 1, 0)


def _linear(path: str, key: str, bias: bool = True) -> dict[str, Rule]:
    rules = {f"{path}/kernel": Rule(f"{key}.weight", _TRANSPOSE)}
    return rules | ({f"{path}/bias": Rule(f"{key}.bias")} if bias else {})


def _norm(path: str, key: str) -> dict[str, Rule]:
    return {f"{path}/scale": Rule(f"{key}.weight"), f"{path}/bias": Rule(f"{key}.bias")}


def _conv(path: str, key: str) -> dict[str, Rule]:
    return {f"{path}/kernel": Rule(f"{key}.weight", _CONV), f"{path}/bias": Rule(f"{key}.bias")}


def _attention(
    path: str, key: str, query: str, key_name: str, value: str, out: str
) -> dict[str, Rule]:
    return {
        **_linear(f"{path}/query", f"{key}.{query}"),
        **_linear(f"{path}/key", f"{key}.{key_name}", bias=False),
        **_linear(f"{path}/value", f"{key}.{value}"),
        **_linear(f"{path}/out", f"{key}.{out}"),
    }


def hf_whisper(prefix: str = "model.encoder.") -> Layout:
    """Encoder of a Hugging Face Whisper checkpoint. `WhisperForConditionalGeneration` has the prefix "model.encoder."."""
    block = f"{prefix}layers.{{layer}}."
    return {
        **_conv("conv1", f"{prefix}conv1"),
        **_conv("conv2", f"{prefix}conv2"),
        "positions": Rule(f"{prefix}embed_positions.weight"),
        **_norm("layers/attention_norm", f"{block}self_attn_layer_norm"),
        **_attention(
            "layers/attention", f"{block}self_attn", "q_proj", "k_proj", "v_proj", "out_proj"
        ),
        **_norm("layers/mlp_norm", f"{block}final_layer_norm"),
        **_linear("layers/mlp_in", f"{block}fc1"),
        **_linear("layers/mlp_out", f"{block}fc2"),
        **_norm("final_norm", f"{prefix}layer_norm"),
    }


HF_WHISPER_IGNORED = (r"(model\.)?decoder\..*", r"proj_out\.weight")

_QWEN3_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def hf_qwen3(prefix: str = "", base: str = "") -> Layout:
    """A Hugging Face Qwen3ForCausalLM. PEFT puts a `base` (".base_layer") into the names of adapted layers."""
    block = f"{prefix}model.layers.{{layer}}."
    rules = {
        "embed_tokens": Rule(f"{prefix}model.embed_tokens.weight"),
        "lm_head": Rule(f"{prefix}lm_head.weight"),
        "final_norm/scale": Rule(f"{prefix}model.norm.weight"),
        "layers/attention_norm/scale": Rule(f"{block}input_layernorm.weight"),
        "layers/mlp_norm/scale": Rule(f"{block}post_attention_layernorm.weight"),
        "layers/query_norm/scale": Rule(f"{block}self_attn.q_norm.weight"),
        "layers/key_norm/scale": Rule(f"{block}self_attn.k_norm.weight"),
    }
    for ours, theirs in _QWEN3_PROJECTIONS.items():
        rules |= _linear(f"layers/{ours}", f"{block}{theirs}{base}", bias=False)
    return rules


def peft_lora(prefix: str = "base_model.model.", adapter: str = "") -> Layout:
    """LoRA leaves under PEFT's names; `adapter` (".default") stands in a live model's names, not in adapter files."""
    rules = {}
    for ours, theirs in _QWEN3_PROJECTIONS.items():
        key = f"{prefix}model.layers.{{layer}}.{theirs}"
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


def _downsampler(path: str, key: str, norm: str) -> dict[str, Rule]:
    return {
        **_conv(f"{path}/conv1", f"{key}.conv1"),
        **_conv(f"{path}/conv2", f"{key}.conv2"),
        **_norm(f"{path}/norm", f"{key}.{norm}"),
    }


def released(num_stages: int = 3, detail_recovery_layers: int = 2) -> Layout:
    """The authors' state_dict, over the whole parameter tree. Buffers (position tables) are parameters here."""
    block = "encoder.whisper.blocks.{layer}."
    names = ("query", "q_pos_embeds", "kv_pos_embeds", "q_ln", "kv_ln", "out_proj")
    rules = {
        **_conv("encoder/conv1", "encoder.whisper.conv1"),
        **_conv("encoder/conv2", "encoder.whisper.conv2"),
        "encoder/positions": Rule("encoder.whisper.positional_embedding"),
        **_norm("encoder/layers/attention_norm", f"{block}attn_ln"),
        **_attention("encoder/layers/attention", f"{block}attn", "query", "key", "value", "out"),
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
        rules |= _attention(f"{ours}/self_attention", f"{theirs}.attn", "q", "k", "v", "out_proj")
        rules |= _attention(
            f"{ours}/cross_attention", f"{theirs}.cross_attn", "q", "k", "v", "out_proj"
        )
        rules |= {
            **_norm(f"{ours}/self_norm", f"{theirs}.norm1"),
            **_norm(f"{ours}/cross_norm", f"{theirs}.norm2"),
        }
    llm = {
        **hf_qwen3(RELEASED_LLM, base=".base_layer"),
        **peft_lora(RELEASED_LLM, adapter=".default"),
    }
    return rules | {f"llm/{path}": rule for path, rule in llm.items()}


RELEASED_LLM = "llm.base_model.model."  # PEFT's names, inside the authors' module
RELEASED_IGNORED_WHEN_TIED = (r"llm\.base_model\.model\.lm_head\.weight",)


def hf_fastslm(num_stages: int = 3, detail_recovery_layers: int = 2) -> Layout:
    """Our folder for PyTorch (see `hf_template/modeling_fastslm.py`), over the whole parameter tree."""
    names = ("query", "query_positions", "context_positions", "query_norm", "context_norm", "out")
    rules = {
        **{f"encoder/{path}": rule for path, rule in hf_whisper("encoder.").items()},
        **{f"llm/{path}": rule for path, rule in {**hf_qwen3(HF_LLM), **peft_lora(HF_LLM)}.items()},
        **_compressor(
            "hfq_former/semantic_distillation", "hfq_former.semantic_distillation", names, lead=0
        ),
        **_linear("hfq_former/projection", "hfq_former.projection"),
    }
    for stage in range(num_stages):
        rules |= _compressor(
            f"hfq_former/compressor_{stage + 1}", f"hfq_former.compressors.{stage}", names, lead=0
        )
    for level in range(num_stages - 1):
        rules |= _downsampler(
            f"hfq_former/downsampler_{level + 1}", f"hfq_former.downsamplers.{level}", "norm"
        )
    for layer in range(detail_recovery_layers):
        ours, theirs = f"hfq_former/detail_recovery_{layer}", f"hfq_former.detail_recovery.{layer}"
        for part in ("self", "cross"):
            rules |= _attention(
                f"{ours}/{part}_attention",
                f"{theirs}.{part}_attention",
                "query",
                "key",
                "value",
                "out",
            )
            rules |= _norm(f"{ours}/{part}_norm", f"{theirs}.{part}_norm")
    return rules


HF_LLM = "llm."
