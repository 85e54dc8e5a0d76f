"""Processor of FastSLM in PyTorch: prompts and audio → the model's inputs.

Every exported folder has a copy of this file:

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor.apply_transcription_request("speech.wav")
"""

from collections.abc import Sequence

import numpy as np
from transformers import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


class FastSLMProcessorKwargs(ProcessingKwargs, total=False):
    """Prompts are padded on the left, as generation requires."""

    _defaults = {  # noqa: RUF012
        "text_kwargs": {"padding": True, "padding_side": "left", "add_special_tokens": False},
        "common_kwargs": {"return_tensors": "pt"},
    }


class FastSLMProcessor(ProcessorMixin):
    """The feature extractor and the tokenizer.

    A prompt has one <|AUDIO|>, which becomes as many as the recording has speech tokens.
    """

    valid_processor_kwargs = FastSLMProcessorKwargs

    def __init__(self, feature_extractor, tokenizer, chat_template=None) -> None:  # noqa: ANN001
        self.audio_token = "<|AUDIO|>"
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)
        tokenizer.padding_side = "left"
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **_) -> str:
        """What replaces the <|AUDIO|> of a recording in the prompt."""
        return self.audio_token * int(audio_inputs["num_audio_tokens"][audio_idx])

    def apply_transcription_request(
        self,
        audio: str | np.ndarray | Sequence[str | np.ndarray],
        task: str = "asr",
        prompt: str | None = None,
    ) -> BatchFeature:
        """Recordings (file, URL or float samples [n] at 16 kHz) → inputs of `generate`.

        Args:
            task: "asr", "ast", "ssum" or "sqqa".
            prompt: replaces the task's own instruction.

        Raises:
            ValueError: the prompt contains a control token, such as <|im_end|>.
        """
        for token in self.tokenizer.added_tokens_decoder.values():
            if prompt and token.special and token.content in prompt:
                raise ValueError(f"the prompt contains the control token {token.content}")
        recordings = audio if isinstance(audio, (list, tuple)) else [audio]
        text = [{"type": "text", "text": prompt}] if prompt else []
        content = [{"type": "audio"}, *text]
        chat = self.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, task=task
        )
        samples = self.feature_extractor.fetch_audio(list(recordings))
        return self(text=[chat] * len(samples), audio=samples)
