"""A working directory → the authors' state_dict, an adapter for PEFT, or a folder that transformers loads with PyTorch."""

import os
import pathlib
import shutil
import warnings

import ml_dtypes
import numpy as np

from fastslm_jax import audio
from fastslm_jax.convert import importing, stored
from fastslm_jax.data import prompts
from fastslm_jax.errors import UserError
from fastslm_jax.weights import engine, layouts
from fastslm_jax.weights.tensors import (
    ConversionError,
    SafetensorsSource,
    Tensor,
    finished_folder,
    write_safetensors,
    write_sharded,
)

LAYOUTS = ("released", "peft", "hf")
MODELING = pathlib.Path(__file__).with_name("modeling_fastslm.py")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def export(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    layout: str,
    *,
    step: int | None = None,
    merge_lora: bool = False,
    pt: bool = False,
) -> list[Tensor]:
    """Writes the folder and returns the tensors in it."""
    if layout not in LAYOUTS:
        raise UserError(f"--layout={layout}: is not one of {', '.join(LAYOUTS)}")
    if merge_lora and layout != "hf":
        raise UserError(f"--merge_lora: is for --layout=hf; {layout} holds LoRA as such")
    if pt and layout != "released":
        raise UserError(f"--pt: is for --layout=released; {layout} is read from safetensors")
    given = stored.open_workdir(workdir, step)
    if layout != "hf" and not given.has_lora:
        raise UserError(
            f"{workdir}: has no LoRA (config.model.lora.rank is 0), {layout} needs it; use --layout=hf"
        )
    write = {"released": write_released, "peft": write_peft, "hf": write_hf}[layout]
    with finished_folder(out) as folder:
        tensors = write(folder, given.merged() if merge_lora else given)
        if pt:
            write_torch(folder / "model.safetensors", folder / "model.pt")
    return tensors


# ------------------------------------------------------------------------------------------------------------- released


def released_tensors(given: stored.Stored) -> list[Tensor]:
    """The authors' state_dict, tied head included, in the types that an imported checkpoint came in."""
    options = given.config.model
    layout = layouts.released(len(options.stage_tokens), options.detail_recovery_layers)
    leaves = {}
    for path, leaf in given.leaves.items():
        dtype = importing.original_dtype(given, path)
        leaves[path] = leaf if dtype is None else leaf.astype(dtype)
    tensors = engine.tensors(leaves, layout)
    if given.model.llm.tied_embeddings:
        name = f"{layouts.RELEASED_LLM}model.embed_tokens.weight"
        embedding = next(tensor for tensor in tensors if tensor.key == name)
        tensors.append(embedding._replace(key=f"{layouts.RELEASED_LLM}lm_head.weight"))
    return tensors


def write_released(folder: pathlib.Path, given: stored.Stored) -> list[Tensor]:
    """model.safetensors, and config.json and tokenizer/ with what the tensors do not tell."""
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
        "compression_size": options.compression_size,
        "detail_recovery_layers": options.detail_recovery_layers,
        "llm": given.llm_config,
        "lora": {
            "r": options.lora.rank,
            "alpha": options.lora.alpha,
            "dropout": options.lora.dropout,
            "target_modules": LORA_TARGETS,
        },
        "special_tokens": list(prompts.ADDED_TOKENS),
        "dtype": options.dtype,
        "audio_padding": options.audio_padding,
    }
    stored.save_json(folder / "config.json", config)
    prompts.load_tokenizer(given.tokenizer, given.model.llm.vocab_size).save_pretrained(
        folder / "tokenizer"
    )
    return tensors


def write_torch(weights: pathlib.Path, out: pathlib.Path) -> None:
    """The same tensors as a state_dict of `torch.save`; they are mapped from the safetensors file, not held."""
    try:
        import torch
    except ImportError:
        raise ConversionError(
            "--pt needs PyTorch; pip install torch, or use the safetensors file"
        ) from None
    source = SafetensorsSource(weights)

    def tensor(key):
        value = source.read(key)
        is_bfloat16 = value.dtype == ml_dtypes.bfloat16
        value = torch.from_numpy(value.view(np.int16) if is_bfloat16 else value)
        return value.view(torch.bfloat16) if is_bfloat16 else value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mapped file is read-only, and nobody writes to it
        torch.save({key: tensor(key) for key in sorted(source.keys())}, out)


# ----------------------------------------------------------------------------------------------------------------- peft


def write_peft(folder: pathlib.Path, given: stored.Stored) -> list[Tensor]:
    """An adapter for the language model. It holds the LoRA only: the HFQ-Former is no part of Qwen3."""
    lora = {
        path.removeprefix("llm/"): leaf
        for path, leaf in given.leaves.items()
        if path.endswith(("/lora_a", "/lora_b"))
    }
    tensors = engine.tensors(lora, layouts.peft_lora())
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    options = given.config.model.lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(given.config.base.llm),
        "r": options.rank,
        "lora_alpha": int(options.alpha) if float(options.alpha).is_integer() else options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": LORA_TARGETS,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    stored.save_json(folder / "adapter_config.json", config)
    return tensors


# ------------------------------------------------------------------------------------------------------------------- hf


def write_hf(folder: pathlib.Path, given: stored.Stored) -> list[Tensor]:
    """A folder that needs PyTorch and transformers, and nothing of this package."""
    options = given.config.model
    tensors = engine.tensors(
        given.leaves, layouts.hf_fastslm(len(options.stage_tokens), options.detail_recovery_layers)
    )
    files = write_sharded(folder, tensors)
    text_config = {
        name: value
        for name, value in given.llm_config.items()
        if name not in ("torch_dtype", "dtype", "_name_or_path")
    }
    config = {
        "model_type": "fastslm",
        "architectures": ["FastSLM"],
        "auto_map": {
            "AutoConfig": "modeling_fastslm.FastSLMConfig",
            "AutoModel": "modeling_fastslm.FastSLM",
        },
        "dtype": options.dtype,
        "audio_config": {
            name: value
            for name, value in importing.whisper_config(given).items()
            if name != "architectures"
        },
        "text_config": text_config,
        "stage_tokens": list(options.stage_tokens),
        "compression_size": options.compression_size,
        "detail_recovery_layers": options.detail_recovery_layers,
        "head_dim": given.model.hfq_former.head_dim,
        "lora_rank": options.lora.rank,
        "lora_alpha": options.lora.alpha,
        "audio_padding": options.audio_padding,
        "tie_word_embeddings": given.model.llm.tied_embeddings,
    }
    stored.save_json(folder / "config.json", config)
    tokenizer = prompts.load_tokenizer(given.tokenizer, given.model.llm.vocab_size)
    tokenizer.save_pretrained(folder)
    generation = {
        "do_sample": False,
        "eos_token_id": tokenizer.convert_tokens_to_ids(prompts.END_OF_TURN),
        "pad_token_id": tokenizer.pad_token_id,
    }
    stored.save_json(folder / "generation_config.json", generation)
    encoder = given.model.encoder
    processor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": encoder.num_mels,
        "sampling_rate": audio.SAMPLE_RATE,
        "n_fft": audio.N_FFT,
        "hop_length": audio.HOP,
        "chunk_length": 2 * encoder.max_positions * audio.HOP // audio.SAMPLE_RATE,
        "padding_value": 0.0,
        "audio_padding": options.audio_padding,
    }
    stored.save_json(folder / "preprocessor_config.json", processor)
    shutil.copyfile(MODELING, folder / MODELING.name)
    (folder / "README.md").write_text(model_card(given, files))
    return tensors


def model_card(given: stored.Stored, files: int) -> str:
    model, options = given.model, given.config.model
    named = [
        name
        for name in (given.config.base.whisper, given.config.base.llm)
        if not os.path.isdir(name)
    ]
    bases = "".join(f"- {name}\n" for name in named)
    lora = (
        f"LoRA of rank {options.lora.rank} (alpha {options.lora.alpha:g}) is separate and is off for prompts without audio, "
        "which the base model then answers."
        if given.has_lora
        else "LoRA is merged into the weights, so prompts without audio are answered by the adapted model too."
    )
    return f"""---
library_name: transformers
pipeline_tag: automatic-speech-recognition
{f"base_model:{chr(10)}{bases}" if named else ""}tags: [speech, asr, fastslm]
---
# FastSLM

Speech in, text out: a Whisper encoder of width {model.encoder.width} with {model.encoder.num_layers} layers, an HFQ-Former
that makes {options.compression_size} tokens of each {model.window.seconds:g} s, and a Qwen3 of width {model.llm.width} with
{model.llm.num_layers} layers. {lora}

```python
import soundfile
from transformers import AutoModel

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
waveform, rate = soundfile.read("speech.wav", dtype="float32")  # one channel at 16 000 Hz, of any length
print(model.transcribe(waveform))                                # task: asr, ast, ssum or sqqa
print(model.transcribe(waveform, task="ssum", do_sample=True, temperature=0.2, top_p=0.95, top_k=20))
```

It needs PyTorch and transformers; `modeling_fastslm.py` is the whole model. Weights: {files} safetensors file{"s" * (files > 1)},
exported from step {given.step} of the run `{given.config.name}`.

The method is FastSLM's (arXiv 2601.06199).
"""
