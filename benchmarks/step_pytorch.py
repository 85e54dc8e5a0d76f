"""The exported PyTorch model against ours: same weights, encoder batch and number of threads."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from step_harness import Batch, Bench, compile_case, time_cases
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    SequenceFeatureExtractor,
)

from fastslm_jax import devices
from fastslm_jax.audio import SAMPLE_RATE
from fastslm_jax.convert import exporting
from fastslm_jax.inference import programs
from fastslm_jax.models import log_mel
from fastslm_jax.models.fastslm import largest_divisor
from fastslm_jax.training import experiment, optim
from fastslm_jax.training.checkpoint import Checkpoints

FLAGS = flags.FLAGS


def export(bench: Bench, scratch: pathlib.Path) -> pathlib.Path:
    """Saves a checkpoint and exports it. Returns the folder of the export."""
    config = bench.config
    checkpoints = Checkpoints(scratch / "run")
    saved = experiment.saved_paths(bench.params, config.trainable)
    meta = {
        "config": json.loads(config.to_json_best_effort()),
        "row": 0,
        "bases": bench.setup.fingerprints(),
    }
    checkpoints.save(1, {path: bench.params[path] for path in saved}, {"step": jnp.int32(1)}, meta)
    checkpoints.wait()
    checkpoints.close()
    exporting.export(scratch / "run", scratch / "hf", "hf")
    return scratch / "hf"


def load(folder: pathlib.Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """The exported model; the HFQ-Former and LoRA are trainable."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    model.to(device).requires_grad_(False)
    model.model.hfq_former.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return model


def encode(
    model: torch.nn.Module, extractor: SequenceFeatureExtractor, waveform: torch.Tensor, group: int
) -> torch.Tensor:
    """Samples [n] → features [windows, t, d] of the frozen encoder, `group` windows at a time."""
    windows = extractor.windows(waveform).unflatten(1, (-1, extractor.window_frames))
    windows = windows.transpose(0, 1).to(model.dtype)
    tower = model.model.audio_tower
    with torch.no_grad():
        return torch.cat([tower(part).last_hidden_state for part in windows.split(group)])


def loss_and_gradients(
    model: torch.nn.Module,
    extractor: SequenceFeatureExtractor,
    waveform: torch.Tensor,
    batch: Batch,
    group: int,
) -> float:
    """Forward and backward of a row's one example; see `encode`."""
    length = int((batch["segment_ids"][0] > 0).sum())

    def row(name: str) -> torch.Tensor:
        return torch.from_numpy(batch[name][0, :length]).to(waveform.device)

    tokens, labels = row("tokens").long(), row("labels").long()
    slots, mask = row("speech_slot"), row("loss_mask") > 0
    model.zero_grad()
    features = encode(model, extractor, waveform, group)
    speech = model.model.hfq_former(features).flatten(0, 1)
    embeddings = model.get_input_embeddings()(tokens)
    embeddings = torch.where(slots[:, None] >= 0, speech[slots.clamp(min=0)], embeddings)
    hidden = model.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state[0]
    logits = model.lm_head(hidden[mask]).float()
    loss = torch.nn.functional.cross_entropy(logits, labels[mask])
    loss.backward()
    return loss.item()


def against_pytorch(bench: Bench, scratch: pathlib.Path, device: str) -> dict[str, list[dict]]:
    """Times both on one recording of --minutes: a training example, and encoding alone."""
    torch.set_num_threads(devices.cores())
    dtype = torch.bfloat16 if bench.config.model.dtype == "bfloat16" else torch.float32
    folder = export(bench, scratch)
    model = load(folder, dtype, device)
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    shape, batch = bench.long_row(FLAGS.minutes)
    group = largest_divisor(shape.windows, bench.model.window_batch or shape.windows)
    samples = np.random.default_rng(0).normal(0, 3000, round(60 * FLAGS.minutes * SAMPLE_RATE))
    waveform = samples.astype(np.int16).astype(np.float32) / 32768
    waveform = torch.from_numpy(waveform).to(device)

    def speech_tokens() -> None:
        with torch.no_grad():
            features = encode(model, extractor, waveform, group)
            torch.cat([model.model.hfq_former(part) for part in features.split(group)])
        if device != "cpu":
            torch.cuda.synchronize()

    params = optim.merge(bench.params, {})
    inputs = [batch[name][0] for name in ("audio", "window_frames", "window_recording")]
    inputs.append(np.full(shape.windows, log_mel.LOWEST, np.float32))
    rows = {
        "long example": time_cases(
            compile_case(*bench.step(shape), batch),
            (functools.partial(loss_and_gradients, model, extractor, waveform, batch, group), None),
        ),
        "encoding": time_cases(
            (lambda: programs.encode(bench.model, params, *inputs, mesh=None), None),
            (speech_tokens, None),
        ),
    }
    if device != "cpu":
        rows["long example"][1]["gib"] = torch.cuda.max_memory_allocated() / 2**30
    return rows
