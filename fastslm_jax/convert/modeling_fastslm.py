"""FastSLM in PyTorch: log-mel → Whisper encoder → HFQ-Former → decoder (arXiv 2601.06199).

This file contains the complete model and requires only torch and transformers. Every exported
folder has a copy of it:

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    text = model.transcribe(waveform)  # float32 samples at 16 kHz, of any length

Shapes: b windows; t, s frames or tokens; d width.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
)
from transformers.audio_utils import mel_filter_bank
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

SAMPLE_RATE, N_FFT, HOP = 16_000, 400, 160
AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
TASKS = {  # task: (token, instruction used in training)
    "asr": ("<|ASR|>", "Transcribe the audio clip into text."),
    "ast": ("<|AST|>", "Translate the audio clip into Korean."),
    "ssum": ("<|SSUM|>", "Summarize the audio clip."),
    "sqqa": ("<|SQQA|>", "Answer the question in the audio clip."),
}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastSLMConfig(PretrainedConfig):
    """Configuration of a FastSLM.

    Args:
        audio_config: Whisper config of the encoder.
        text_config: config of the language model: Qwen3, Qwen2 or Llama (by its model_type).
        stage_tokens: queries at each time resolution of the HFQ-Former.
        compression_size: speech tokens per window.
        detail_recovery_layers: number of detail recovery layers.
        head_dim: head dimension of the HFQ-Former.
        lora_rank: 0 if LoRA is merged into the weights.
        lora_alpha: LoRA is scaled by lora_alpha / lora_rank.
        audio_padding: how the last window is padded: "released" with 0.0 after the log-mel,
            "whisper" with silence before it.
    """

    model_type = "fastslm"
    sub_configs = {"audio_config": WhisperConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        audio_config: WhisperConfig | dict | None = None,
        text_config: PretrainedConfig | dict | None = None,
        stage_tokens: Sequence[int] = (80, 80, 80),
        compression_size: int = 50,
        detail_recovery_layers: int = 2,
        head_dim: int = 64,
        lora_rank: int = 0,
        lora_alpha: float = 64.0,
        audio_padding: str = "released",
        **kwargs,
    ) -> None:
        if not isinstance(audio_config, WhisperConfig):
            audio_config = WhisperConfig(**(audio_config or {}))
        if not isinstance(text_config, PretrainedConfig):
            text_config = AutoConfig.for_model(**{"model_type": "qwen3", **(text_config or {})})
        self.audio_config, self.text_config = audio_config, text_config
        self.stage_tokens, self.compression_size = tuple(stage_tokens), compression_size
        self.detail_recovery_layers, self.head_dim = detail_recovery_layers, head_dim
        self.lora_rank, self.lora_alpha, self.audio_padding = lora_rank, lora_alpha, audio_padding
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Multi-head attention: query [b, t, d], key [b, s, d], value [b, s, d] → [b, t, d]."""
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention with projections; as in Whisper, the key projection has no bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.out(
            attend(self.query(x), self.key(context), self.value(context), self.num_heads)
        )


class Compressor(nn.Module):
    """Learned queries attend to the normalized context: [b, context, d] → [b, num_queries, d].

    There is an output projection, but no query, key or value projection.
    """

    def __init__(self, num_queries: int, context: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.register_buffer("query_positions", torch.empty(num_queries, width))
        self.register_buffer("context_positions", torch.empty(context, width))
        self.query_norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = (self.query_norm(self.query) + self.query_positions).expand(len(x), -1, -1)
        value = self.context_norm(x)
        key = value + self.context_positions
        return self.out(attend(query, key, value, self.num_heads))


class Downsampler(nn.Module):
    """Halves the time resolution: [b, t, d] → [b, t / 2, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(x.transpose(1, 2)))))
        return self.norm(x.transpose(1, 2))


class DetailRecovery(nn.Module):
    """Tokens attend to each other, then to the features of all levels."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.self_norm, self.cross_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = Attention(width, num_heads)
        self.cross_attention = Attention(width, num_heads)

    def forward(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        hidden = self.self_norm(x)
        x = x + self.self_attention(hidden, hidden)
        return x + self.cross_attention(self.cross_norm(x), features)


class HFQFormer(nn.Module):
    """Hierarchical Frame Querying Transformer.

    Encoder features [b, t, d] → speech tokens [b, compression_size, text width].
    """

    def __init__(self, config: FastSLMConfig) -> None:
        super().__init__()
        width = config.audio_config.d_model
        num_heads, stages = width // config.head_dim, config.stage_tokens
        lengths = [config.audio_config.max_source_positions]
        while len(lengths) < len(stages):
            lengths.append((lengths[-1] + 1) // 2)
        self.downsamplers = nn.ModuleList(Downsampler(width) for _ in stages[1:])
        self.compressors = nn.ModuleList(
            Compressor(n, t, width, num_heads) for n, t in zip(stages, lengths, strict=True)
        )
        self.semantic_distillation = Compressor(
            config.compression_size, sum(stages), width, num_heads
        )
        self.detail_recovery = nn.ModuleList(
            DetailRecovery(width, num_heads) for _ in range(config.detail_recovery_layers)
        )
        self.projection = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        levels = [features]
        for downsampler in self.downsamplers:
            levels.append(downsampler(levels[-1]))
        stages = [compressor(x) for compressor, x in zip(self.compressors, levels, strict=True)]
        tokens = self.semantic_distillation(torch.cat(stages, dim=1))
        for layer in self.detail_recovery:
            tokens = layer(tokens, torch.cat(levels, dim=1))
        return self.projection(tokens)


class LoRALinear(nn.Linear):
    """x W + scale · x A B, or x W if not enabled."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.scale, self.enabled = scale, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + self.lora_B(self.lora_A(x)) * self.scale if self.enabled else y


class FastSLM(PreTrainedModel):
    """FastSLM for one recording at a time. LoRA applies only to prompts with audio."""

    config_class = FastSLMConfig
    _supports_sdpa = True
    _no_split_modules = (
        *("Qwen3DecoderLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer", "WhisperEncoderLayer"),
    )

    def __init__(self, config: FastSLMConfig) -> None:
        super().__init__(config)
        self.encoder = WhisperEncoder(config.audio_config)
        self.hfq_former = HFQFormer(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        if config.lora_rank:
            self._add_lora(config.lora_rank, config.lora_alpha / config.lora_rank)
        self._tokenizer = None
        self.post_init()

    def _add_lora(self, rank: int, scale: float) -> None:
        for layer in self.llm.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name in LORA_TARGETS:
                    if hasattr(block, name):
                        setattr(block, name, LoRALinear(getattr(block, name), rank, scale))

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: weights are always loaded from the folder."""

    # ---- Speech ----

    def log_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """Samples [n] at 16 kHz → log-mel [bands, frames], relative to the recording's maximum."""
        filters = mel_filter_bank(
            N_FFT // 2 + 1,
            self.config.audio_config.num_mel_bins,
            0.0,
            SAMPLE_RATE / 2,
            SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        filters = torch.from_numpy(filters).to(waveform.device, torch.float32)
        window = torch.hann_window(N_FFT, device=waveform.device)
        spectrum = torch.stft(
            waveform,
            N_FFT,
            HOP,
            window=window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        mel = (filters.T @ spectrum[:, :-1].abs().square()).clamp(min=1e-10).log10()
        return (mel.maximum(mel.max() - 8.0) + 4.0) / 4.0

    def windows(self, waveform: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Samples [n] → log-mel windows [b, bands, frames]."""
        frames = 2 * self.config.audio_config.max_source_positions
        waveform = torch.as_tensor(waveform, dtype=torch.float32, device=self.device)
        if waveform.dim() != 1:
            raise ValueError(
                f"the waveform has shape {tuple(waveform.shape)}, expected [samples]: one channel "
                "at 16 kHz"
            )
        waveform = F.pad(waveform, (0, max(0, SAMPLE_RATE - len(waveform))))  # to at least 1 s
        count = math.ceil(len(waveform) // HOP / frames)
        if self.config.audio_padding == "whisper":
            padding = max(0, count * frames * HOP - len(waveform))
            mel = self.log_mel(F.pad(waveform, (0, padding)))[:, : count * frames]
        else:
            mel = self.log_mel(waveform)
            mel = F.pad(mel, (0, count * frames - mel.shape[1]))
        return mel.unflatten(1, (count, frames)).transpose(0, 1)

    @torch.no_grad()
    def speech_tokens(
        self, waveform: torch.Tensor | np.ndarray, batch_size: int = 8
    ) -> torch.Tensor:
        """Samples [n] → speech tokens [b · compression_size, text width].

        Args:
            batch_size: windows to encode at a time.
        """
        parts = self.windows(waveform).to(self.dtype).split(batch_size)
        return torch.cat(
            [self.hfq_former(self.encoder(part).last_hidden_state).flatten(0, 1) for part in parts]
        )

    # ---- Prompt and text ----

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.config._name_or_path, config=self.config.text_config
            )
        return self._tokenizer

    def prompt_ids(self, task: str | None = "asr", instruction: str | None = None) -> torch.Tensor:
        """Token ids [t] of a prompt, with <|AUDIO|> as one id.

        Args:
            task: "asr", "ast", "ssum" or "sqqa"; None for a prompt without audio.
            instruction: replaces the task's own instruction.
        """
        content = instruction
        if task is not None:
            token, default = TASKS[task]
            content = f"{token}{AUDIO_BOS}{AUDIO}{AUDIO_EOS}\n{instruction or default}"
        turns = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, device=self.device)

    def embed(self, input_ids: torch.Tensor, speech: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids [t] → embeddings [1, t', d], with <|AUDIO|> replaced by the speech tokens."""
        embeddings = self.llm.get_input_embeddings()(input_ids.to(self.device))
        if speech is not None:
            audio_id = self.tokenizer.convert_tokens_to_ids(AUDIO)
            positions = (input_ids == audio_id).nonzero()[:, 0]
            if len(positions) != 1:
                raise ValueError(f"the prompt has {len(positions)} {AUDIO} tokens, expected one")
            before, after = embeddings[: positions[0]], embeddings[positions[0] + 1 :]
            embeddings = torch.cat([before, speech.to(embeddings.dtype), after])
        return embeddings[None]

    def use_lora(self, enabled: bool) -> None:
        for module in self.llm.modules():
            if isinstance(module, LoRALinear):
                module.enabled = enabled

    def forward(
        self,
        input_ids: torch.Tensor,
        waveform: torch.Tensor | np.ndarray | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [1, t', vocabulary] of one prompt.

        Args:
            input_ids: [t], with <|AUDIO|> as one id if there is audio.
            waveform: samples [n] at 16 kHz. Without audio, LoRA is off.
            **kwargs: passed to the language model.
        """
        self.use_lora(waveform is not None)
        speech = None if waveform is None else self.speech_tokens(waveform)
        output = self.llm(inputs_embeds=self.embed(input_ids, speech), **kwargs)
        return CausalLMOutputWithPast(logits=output.logits, past_key_values=output.past_key_values)

    @torch.no_grad()
    def generate_ids(
        self,
        input_ids: torch.Tensor,
        waveform: torch.Tensor | np.ndarray | None = None,
        **generation,
    ) -> torch.Tensor:
        """Generates token ids [n] for a prompt; see `forward` for the arguments.

        Args:
            **generation: passed to `generate`. By default, decoding is greedy and the maximum
                number of new tokens grows with the duration of the audio.
        """
        self.use_lora(waveform is not None)
        speech = None if waveform is None else self.speech_tokens(waveform)
        embeddings = self.embed(input_ids, speech)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device)
        seconds = 0 if waveform is None else len(waveform) / SAMPLE_RATE
        defaults = {
            "do_sample": False,
            "max_new_tokens": max(512, 64 + int(6 * seconds)),
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.tokenizer.convert_tokens_to_ids("<|im_end|>"),
        }
        options = defaults | generation
        return self.llm.generate(inputs_embeds=embeddings, attention_mask=mask, **options)[0]

    def transcribe(
        self,
        waveform: torch.Tensor | np.ndarray,
        task: str = "asr",
        instruction: str | None = None,
        **generation,
    ) -> str:
        """Samples [n] at 16 kHz → text; see `prompt_ids` and `generate_ids` for the arguments."""
        ids = self.generate_ids(self.prompt_ids(task, instruction), waveform, **generation)
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
