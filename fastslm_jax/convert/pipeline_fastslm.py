"""The ASR pipeline of FastSLM in PyTorch. Every exported folder has a copy of this file.

The pipeline of transformers passes audio without a prompt to the model, which FastSLM needs.
"""

from typing import Any

import numpy as np
import torch
from transformers import Pipeline
from transformers.pipelines.audio_utils import ffmpeg_read


class FastSLMPipeline(Pipeline):
    """Recordings of any length → {"text": transcript}.

    A recording is a file or URL, the bytes of a file, float samples [n] at 16 kHz, or a dict with
    "array" (or "raw") and "sampling_rate".

    Arguments of a call: `task_name` ("asr", "ast", "ssum" or "sqqa"), `prompt` (replaces the task's
    own instruction), and those of `generate`, also as `generate_kwargs`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.feature_extractor = None  # batches are lists of recordings, without padding

    def _sanitize_parameters(
        self,
        task_name: str | None = None,
        prompt: str | None = None,
        generate_kwargs: dict | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        request = {"task_name": task_name, "prompt": prompt}
        request = {name: value for name, value in request.items() if value is not None}
        return {}, request | (generate_kwargs or {}) | kwargs, {}

    def preprocess(self, recording: str | bytes | np.ndarray | torch.Tensor | dict) -> dict:
        rate = self.processor.feature_extractor.sampling_rate
        if isinstance(recording, dict):
            found = recording.get("sampling_rate")
            if found != rate:
                raise ValueError(f"the audio has {found} Hz, expected {rate}; resample it")
            recording = recording["array" if "array" in recording else "raw"]
        elif isinstance(recording, bytes):
            recording = ffmpeg_read(recording, rate)
        elif isinstance(recording, str):
            recording = self.processor.feature_extractor.fetch_audio(recording)
        return {"audio": np.asarray(recording)}

    def _forward(
        self,
        model_inputs: dict,
        task_name: str = "asr",
        prompt: str | None = None,
        **generate_kwargs: Any,
    ) -> dict:
        audio = model_inputs["audio"]  # a list if the pipeline has a batch_size
        request = self.processor.apply_transcription_request(audio, task_name, prompt)
        request = request.to(self.device)
        new = self.model.generate(**request, **generate_kwargs)
        return {"tokens": new[:, request["input_ids"].shape[1] :]}

    def postprocess(self, model_outputs: dict) -> dict[str, str]:
        tokens = model_outputs["tokens"][0]
        return {"text": self.processor.decode(tokens, skip_special_tokens=True).strip()}
