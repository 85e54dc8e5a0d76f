"""Configuration of FastSLM in PyTorch. Every exported folder has a copy of this file."""

from collections.abc import Sequence

from transformers import AutoConfig, PreTrainedConfig, WhisperConfig


class FastSLMConfig(PreTrainedConfig):
    """Configuration of a FastSLM.

    Args:
        audio_config: Whisper config of the encoder.
        text_config: config of the language model: Qwen3, Qwen2 or Llama (by its model_type).
        stage_tokens: queries at each time resolution of the HFQ-Former.
        downsample_factor: between its time resolutions.
        compressor_projections: its compressors have query, key and value projections.
        compression_size: speech tokens per window.
        detail_recovery_layers: number of detail recovery layers.
        head_dim: head dimension of the HFQ-Former.
        audio_token_id: id of <|AUDIO|>, which the prompt has once for every speech token.
        has_adapter: LoRA is not merged into the weights but a PEFT adapter in the same folder. It
            applies to prompts with audio only.
    """

    model_type = "fastslm"
    sub_configs = {"audio_config": WhisperConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        audio_config: WhisperConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        stage_tokens: Sequence[int] = (80, 80, 80),
        compression_size: int = 50,
        detail_recovery_layers: int = 2,
        downsample_factor: int = 2,
        compressor_projections: bool = False,
        head_dim: int = 64,
        audio_token_id: int = 151_669,
        has_adapter: bool = False,
        **kwargs,
    ) -> None:
        if not isinstance(audio_config, WhisperConfig):
            audio_config = WhisperConfig(**(audio_config or {}))
        if not isinstance(text_config, PreTrainedConfig):
            text_config = AutoConfig.for_model(**{"model_type": "qwen3", **(text_config or {})})
        self.audio_config, self.text_config = audio_config, text_config
        self.stage_tokens, self.compression_size = tuple(stage_tokens), compression_size
        self.detail_recovery_layers, self.head_dim = detail_recovery_layers, head_dim
        self.downsample_factor = downsample_factor
        self.compressor_projections = compressor_projections
        self.audio_token_id, self.has_adapter = audio_token_id, has_adapter
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def window_frames(self) -> int:
        """Log-mel frames of 10 ms per encoder window."""
        return 2 * self.audio_config.max_source_positions
