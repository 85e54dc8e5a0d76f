"""Exports a working directory as the authors' state_dict, a PEFT adapter or a PyTorch folder."""

import json
import os
import pathlib
import shutil
import typing
import warnings

import ml_dtypes
import numpy as np

from fastslm_jax import audio
from fastslm_jax.convert import opening, stored
from fastslm_jax.convert.stored import Stored
from fastslm_jax.data import prompts
from fastslm_jax.data.tasks import TASKS
from fastslm_jax.errors import UserError
from fastslm_jax.weights import engine, layouts
from fastslm_jax.weights.tensors import (
    ADAPTER,
    SafetensorsSource,
    Tensor,
    atomic_folder,
    import_torch,
    write_safetensors,
    write_sharded,
)

if typing.TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

LAYOUTS = ("released", "peft", "hf")
CODE = tuple(  # the PyTorch model: every "hf" folder has a copy of these files
    pathlib.Path(__file__).with_name(f"{part}_fastslm.py")
    for part in ("configuration", "feature_extraction", "processing", "modeling", "pipeline")
)
MULTIMODAL_TEMPLATE = """\
{%- set tasks = TASKS %}
{%- set rendered = namespace(turns=[]) %}
{%- for message in messages %}
    {%- if message['content'] is string or not message['content'] %}
        {%- set rendered.turns = rendered.turns + [message] %}
    {%- else %}
        {%- set turn = namespace(audio='', text='') %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {%- set turn.text = turn.text + part['text'] %}
            {%- elif part['type'] in ('audio', 'audio_url', 'input_audio') %}
                {%- set turn.audio = turn.audio + BLOCK %}
            {%- else %}
                {{- raise_exception('content is ' ~ part['type'] ~ ', expected audio or text') }}
            {%- endif %}
        {%- endfor %}
        {%- if turn.audio %}
            {%- set chosen = tasks[task or 'asr'] %}
            {%- if not chosen %}
                {{- raise_exception('task ' ~ task ~ ': expected one of ' ~ tasks | join(', ')) }}
            {%- endif %}
            {%- set turn.text = chosen[0] + turn.audio + '\\n' + (turn.text or chosen[1]) %}
        {%- endif %}
        {%- set rendered.turns = rendered.turns + [dict(message, content=turn.text)] %}
    {%- endif %}
{%- endfor %}
{%- set messages = rendered.turns %}
"""


def export(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    layout: str,
    *,
    step: int | None = None,
    merge_lora: bool = False,
    pt: bool = False,
) -> list[Tensor]:
    """Writes the folder `out`.

    Args:
        layout: "released", "peft" or "hf".
        step: checkpoint to export (default: the newest).
        merge_lora: merge LoRA into the weights ("hf" only).
        pt: also write model.pt ("released" only).

    Returns:
        The written tensors.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout={layout}: expected one of {', '.join(LAYOUTS)}")
    if merge_lora and layout != "hf":
        raise UserError(f"--merge_lora: requires --layout=hf; {layout} stores LoRA separately")
    if pt and layout != "released":
        raise UserError(f"--pt: requires --layout=released; {layout} uses safetensors only")
    given = opening.open_workdir(workdir, step)
    if layout != "hf" and not given.has_lora:
        raise UserError(
            f"{workdir}: has no LoRA (config.model.lora.rank is 0), which {layout} requires; "
            "use --layout=hf"
        )
    if layout != "peft":
        stored.check_adapter(given, layout)
    write = {"released": write_released, "peft": write_peft, "hf": write_hf}[layout]
    with atomic_folder(out) as folder:
        tensors = write(folder, given.merged() if merge_lora else given)
        if pt:
            write_torch(folder / "model.safetensors", folder / "model.pt")
    return tensors


# ---- released ----


def released_tensors(given: Stored) -> list[Tensor]:
    """The authors' state_dict, with a copy of tied embeddings, in the dtypes of the import."""
    options = given.config.model
    layout = layouts.released(len(options.stage_tokens), options.detail_recovery_layers)
    leaves = {}
    for path, leaf in given.leaves.items():
        dtype = given.original_dtype(path)
        leaves[path] = leaf if dtype is None else leaf.astype(dtype)
    tensors = engine.tensors(leaves, layout)
    if given.model.llm.tied_embeddings:
        name = f"{layouts.RELEASED_LLM}model.embed_tokens.weight"
        embedding = next(tensor for tensor in tensors if tensor.key == name)
        tensors.append(embedding._replace(key=f"{layouts.RELEASED_LLM}lm_head.weight"))
    return tensors


def write_released(folder: pathlib.Path, given: Stored) -> list[Tensor]:
    """Writes model.safetensors, tokenizer/, and config.json with what the tensors do not show."""
    tensors = released_tensors(given)
    write_safetensors(folder / "model.safetensors", tensors)
    encoder, options = given.model.encoder, given.config.model
    config = {
        "speech_dim": encoder.width,
        "encoder_layers": encoder.num_layers,
        "encoder_heads": encoder.num_heads,
        "n_mels": encoder.num_mels,
        "n_audio_ctx": encoder.max_positions,
        "stage_tokens": list(options.stage_tokens),
        "compression_size": given.model.tokens_per_window,
        "detail_recovery_layers": options.detail_recovery_layers,
        "llm": given.llm_config,
        "lora": {
            "r": options.lora.rank,
            "alpha": options.lora.alpha,
            "dropout": options.lora.dropout,
            "target_modules": layouts.LORA_TARGETS,
        },
        "special_tokens": list(prompts.ADDED_TOKENS),
        "dtype": options.dtype,
        "audio_padding": options.audio_padding,
    }
    stored.write_json(folder / "config.json", config)
    tokenizer = given.load_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    stored.write_json(
        folder / "tokenizer/generation_config.json", {"eos_token_id": _end_ids(tokenizer)}
    )
    return tensors


def _end_ids(tokenizer: "PreTrainedTokenizerFast") -> int | list[int]:
    """The ids that end an answer, as in generation_config.json; the first is the trained one."""
    ids = prompts.PromptTokenizer(tokenizer).end_ids
    return ids[0] if len(ids) == 1 else list(ids)


def write_torch(weights: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the tensors of a safetensors file with `torch.save`, from the memory-mapped file."""
    torch = import_torch("--pt")
    source = SafetensorsSource(weights)

    def tensor(key: str) -> "torch.Tensor":
        value = source.read(key)
        is_bfloat16 = value.dtype == ml_dtypes.bfloat16
        value = torch.from_numpy(value.view(np.int16) if is_bfloat16 else value)
        return value.view(torch.bfloat16) if is_bfloat16 else value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about read-only arrays, which torch.save does not modify
        torch.save({key: tensor(key) for key in sorted(source.keys())}, out)


# ---- peft ----


def write_peft(folder: pathlib.Path, given: Stored) -> list[Tensor]:
    """Writes LoRA as an adapter of the language model. The HFQ-Former is not included."""
    base = str(given.config.base.llm)
    return _write_adapter(folder, given, layouts.peft_lora(), layouts.LORA_TARGETS, base)


def _write_adapter(
    folder: pathlib.Path,
    given: Stored,
    layout: engine.Layout,
    targets: tuple[str, ...] | str,
    base: str | None,
) -> list[Tensor]:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
        targets: ends of the names of the adapted modules, or a pattern for the whole names.
        base: hub id or folder of the adapted model.
    """
    lora = {
        path.removeprefix("llm/"): leaf
        for path, leaf in given.leaves.items()
        if path.endswith(("/lora_a", "/lora_b"))
    }
    tensors = engine.tensors(lora, layout)
    write_safetensors(folder / ADAPTER, tensors)
    options = given.config.model.lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": int(options.alpha) if float(options.alpha).is_integer() else options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    stored.write_json(folder / "adapter_config.json", config)
    return tensors


# ---- hf ----


def write_hf(folder: pathlib.Path, given: Stored) -> list[Tensor]:
    """Writes a folder that loads with PyTorch and transformers, without this package.

    LoRA is an adapter in the same folder.
    """
    options = given.config.model
    layout = layouts.hf_fastslm(len(options.stage_tokens), options.detail_recovery_layers)
    leaves = {path: leaf for path, leaf in given.leaves.items() if "/lora_" not in path}
    tensors = engine.tensors(leaves, layout)
    num_files = write_sharded(folder, tensors)
    if given.has_lora:
        adapter = layouts.peft_lora(decoder=layouts.HF_DECODER)
        # The encoder has projections of the same names, which are not adapted.
        targets = rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(layouts.LORA_TARGETS)})"
        tensors += _write_adapter(folder, given, adapter, targets, base=None)
    tokenizer = given.load_tokenizer()
    end_ids = _end_ids(tokenizer)
    tokenizer.chat_template = chat_template(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    encoder = given.model.encoder
    auto_map = {
        "AutoFeatureExtractor": "feature_extraction_fastslm.FastSLMFeatureExtractor",
        "AutoProcessor": "processing_fastslm.FastSLMProcessor",
    }
    files = {
        "config.json": _hf_config(given, tokenizer.convert_tokens_to_ids(prompts.AUDIO)),
        "generation_config.json": {
            "do_sample": False,
            "max_new_tokens": 512,  # of prompts without audio
            "eos_token_id": end_ids,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "FastSLMFeatureExtractor",
            "processor_class": "FastSLMProcessor",
            "auto_map": auto_map,
            "feature_size": encoder.num_mels,
            "sampling_rate": audio.SAMPLE_RATE,
            "n_fft": audio.N_FFT,
            "hop_length": audio.HOP,
            "window_frames": given.model.window.frames,
            "tokens_per_window": given.model.tokens_per_window,
            "audio_padding": options.audio_padding,
        },
        "processor_config.json": {"processor_class": "FastSLMProcessor", "auto_map": auto_map},
    }
    for name, content in files.items():
        stored.write_json(folder / name, content)
    for file in CODE:
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(model_card(given, num_files), encoding="utf-8")
    return tensors


def chat_template(template: str) -> str:
    """A language model's chat template that also accepts content as a list of parts.

    {"type": "audio"} opens the turn with the token of the variable `task` (default: asr) and the
    audio; the text parts follow, or else the task's instruction.
    """
    tasks = {name: [task.token, task.instruction] for name, task in TASKS.items()}
    block = f"{prompts.AUDIO_BOS}{prompts.AUDIO}{prompts.AUDIO_EOS}"
    parts = MULTIMODAL_TEMPLATE.replace("TASKS", json.dumps(tasks)).replace(
        "BLOCK", json.dumps(block)
    )
    return parts + template.removeprefix(parts)


def _hf_config(given: Stored, audio_token_id: int) -> dict:
    options = given.config.model
    model = "modeling_fastslm.FastSLMForConditionalGeneration"
    return {
        "model_type": "fastslm",
        "architectures": ["FastSLMForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_fastslm.FastSLMConfig",
            "AutoModel": "modeling_fastslm.FastSLMModel",
            "AutoModelForSpeechSeq2Seq": model,
            "AutoModelForMultimodalLM": model,
        },
        "custom_pipelines": {
            "automatic-speech-recognition": {
                "impl": "pipeline_fastslm.FastSLMPipeline",
                "pt": ["AutoModelForSpeechSeq2Seq"],
            }
        },
        "dtype": options.dtype,
        "audio_config": given.whisper_config,
        "text_config": {
            name: value
            for name, value in given.llm_config.items()
            if name not in ("torch_dtype", "dtype", "_name_or_path")
        },
        "stage_tokens": list(options.stage_tokens),
        "compression_size": given.model.tokens_per_window,
        **{name: options[name] for name in opening.HFQ_FIELDS},
        "head_dim": given.model.adapter.head_dim,
        "audio_token_id": audio_token_id,
        "has_adapter": given.has_lora,
        "tie_word_embeddings": given.model.llm.tied_embeddings,
    }


def model_card(given: Stored, num_files: int) -> str:
    """The README.md of a PyTorch folder, with Hugging Face metadata."""
    model, options = given.model, given.config.model
    names = (given.config.base.whisper, given.config.base.llm)
    hub_ids = "".join(f"- {name}\n" for name in names if not os.path.isdir(name))
    if given.has_lora:
        lora = (
            f"LoRA of rank {options.lora.rank} (alpha {options.lora.alpha:g}) is a PEFT adapter in "
            "this folder (`pip install peft`). It is on for prompts with audio and off for others, "
            "which the base language model answers. On the Hugging Face hub, set "
            "base_model_name_or_path in adapter_config.json to the id of the repository."
        )
    else:
        lora = "LoRA is merged into the weights, so it also applies to prompts without audio."
    return f"""---
library_name: transformers
pipeline_tag: automatic-speech-recognition
{f"base_model:{chr(10)}{hub_ids}" if hub_ids else ""}tags: [speech, asr, fastslm]
---
# FastSLM

A speech language model: audio in, text out.

- Whisper encoder: width {model.encoder.width}, {model.encoder.num_layers} layers
- HFQ-Former: {model.tokens_per_window} tokens per window of {model.window.seconds:g} s
- Decoder: width {model.llm.width}, {model.llm.num_layers} layers

{lora}

```python
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

transcriber = pipeline("automatic-speech-recognition", FOLDER, trust_remote_code=True)
print(transcriber("speech.wav")["text"])  # any length

processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForSpeechSeq2Seq.from_pretrained(FOLDER, trust_remote_code=True)
# task: asr, ast, ssum or sqqa; prompt: replaces the task's own instruction
inputs = processor.apply_transcription_request(["a.wav", "b.wav"], task="ssum")
tokens = model.generate(**inputs, do_sample=True, temperature=0.2, top_p=0.95, top_k=20)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Requires PyTorch and transformers ≥ 5.15.
Exported from step {given.step} of the run `{given.config.name}`; weight files: {num_files}.

Method: FastSLM (arXiv 2601.06199).
"""
