"""FastSLM in PyTorch: log-mel → Whisper encoder → HFQ-Former → Qwen3 (arXiv 2601.06199).

This file is the whole model; it needs torch and transformers only. It lies in every exported folder, beside the weights:

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    text = model.transcribe(waveform)  # float samples at 16 kHz, of any length

Shapes: b windows, t frames or tokens, d encoder width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
)
from transformers.audio_utils import mel_filter_bank
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

SAMPLE_RATE, N_FFT, HOP = 16_000, 400, 160
AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
TASKS = {  # task: (its token, the instruction it was trained with)
    "asr": ("<|ASR|>", "Transcribe the audio clip into text."),
    "ast": ("<|AST|>", "Translate the audio clip into Korean."),
    "ssum": ("<|SSUM|>", "Summarize the audio clip."),
    "sqqa": ("<|SQQA|>", "Answer the question in the audio clip."),
}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastSLMConfig(PretrainedConfig):
    """audio_config is a Whisper config, text_config a Qwen3 config. lora_rank 0: LoRA is merged into the weights.

    audio_padding says how the last window is filled: "released" puts 0.0 after the log-mel, "whisper" silence before it.
    """

    model_type = "fastslm"
    sub_configs = {"audio_config": WhisperConfig, "text_config": Qwen3Config}  # noqa: RUF012

    def __init__(
        self, audio_config=None, text_config=None, stage_tokens=(80, 80, 80), compression_size=50, detail_recovery_layers=2,
        head_dim=64, lora_rank=0, lora_alpha=64.0, audio_padding="released", **kwargs,
    ):  # fmt: skip
        self.audio_config = (
            audio_config
            if isinstance(audio_config, WhisperConfig)
            else WhisperConfig(**(audio_config or {}))
        )
        self.text_config = (
            text_config
            if isinstance(text_config, Qwen3Config)
            else Qwen3Config(**(text_config or {}))
        )
        self.stage_tokens, self.compression_size = tuple(stage_tokens), compression_size
        self.detail_recovery_layers, self.head_dim = detail_recovery_layers, head_dim
        self.lora_rank, self.lora_alpha, self.audio_padding = lora_rank, lora_alpha, audio_padding
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


def attend(query, key, value, num_heads):
    """Multi-head attention on [b, t, d], [b, s, d], [b, s, d] → [b, t, d]."""
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projected attention; query, value and out have biases, key has none."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x, context):
        return self.out(
            attend(self.query(x), self.key(context), self.value(context), self.num_heads)
        )


class Compressor(nn.Module):
    """Learned queries read the normalised context [b, context, d] → [b, queries, d]: no query, key or value projection."""

    def __init__(self, num_queries, context, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.register_buffer("query_positions", torch.empty(num_queries, width))
        self.register_buffer("context_positions", torch.empty(context, width))
        self.query_norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        query = self.query_norm(self.query) + self.query_positions
        value = self.context_norm(x)
        return self.out(
            attend(
                query.expand(len(x), -1, -1), value + self.context_positions, value, self.num_heads
            )
        )


class Downsampler(nn.Module):
    """[b, t, d] → [b, t / 2, d]."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = F.gelu(self.conv2(F.gelu(self.conv1(x.transpose(1, 2)))))
        return self.norm(x.transpose(1, 2))


class DetailRecovery(nn.Module):
    """Tokens attend to each other, then to the features of every level."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.self_norm, self.cross_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention, self.cross_attention = (
            Attention(width, num_heads),
            Attention(width, num_heads),
        )

    def forward(self, x, features):
        hidden = self.self_norm(x)
        x = x + self.self_attention(hidden, hidden)
        return x + self.cross_attention(self.cross_norm(x), features)


class HFQFormer(nn.Module):
    """Hierarchical Frame Querying Transformer: features of a window [b, t, d] → speech tokens [b, n, llm width]."""

    def __init__(self, config):
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

    def forward(self, features):
        levels = [features]
        for downsampler in self.downsamplers:
            levels.append(downsampler(levels[-1]))
        stages = [compressor(x) for compressor, x in zip(self.compressors, levels, strict=True)]
        tokens = self.semantic_distillation(torch.cat(stages, dim=1))
        for layer in self.detail_recovery:
            tokens = layer(tokens, torch.cat(levels, dim=1))
        return self.projection(tokens)


class LoRALinear(nn.Linear):
    """x W + scale · x A B. `enabled` False gives the base model."""

    def __init__(self, base, rank, scale):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.lora_A, self.lora_B = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        self.scale, self.enabled = scale, True

    def forward(self, x):
        y = super().forward(x)
        return y + self.lora_B(self.lora_A(x)) * self.scale if self.enabled else y


class FastSLM(PreTrainedModel):
    config_class = FastSLMConfig
    _supports_sdpa = True
    _no_split_modules = ("Qwen3DecoderLayer", "WhisperEncoderLayer")

    def __init__(self, config):
        super().__init__(config)
        self.encoder = WhisperEncoder(config.audio_config)
        self.hfq_former = HFQFormer(config)
        self.llm = Qwen3ForCausalLM(config.text_config)
        if config.lora_rank:
            for layer in self.llm.model.layers:
                for block in (layer.self_attn, layer.mlp):
                    for name in LORA_TARGETS:
                        if hasattr(block, name):
                            scale = config.lora_alpha / config.lora_rank
                            setattr(
                                block,
                                name,
                                LoRALinear(getattr(block, name), config.lora_rank, scale),
                            )
        self._tokenizer = None
        self.post_init()

    def _init_weights(self, module):
        """Weights come from the folder."""

    # ---------------------------------------------------------------------------------------------------------- speech

    def log_mel(self, waveform):
        """Samples [n] at 16 kHz → log-mel [bands, frames] of the whole recording; its maximum is the recording's."""
        num_mels = self.config.audio_config.num_mel_bins
        filters = mel_filter_bank(
            N_FFT // 2 + 1,
            num_mels,
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

    def windows(self, waveform):
        """Samples [n] → log-mel windows [b, bands, frames]."""
        frames = 2 * self.config.audio_config.max_source_positions
        waveform = torch.as_tensor(waveform, dtype=torch.float32, device=self.device)
        if waveform.dim() != 1:
            raise ValueError(
                f"the waveform has shape {tuple(waveform.shape)}; one channel of samples at 16 kHz is needed"
            )
        waveform = F.pad(waveform, (0, max(0, SAMPLE_RATE - len(waveform))))  # one second at least
        count = math.ceil(len(waveform) // HOP / frames)
        if self.config.audio_padding == "whisper":
            mel = self.log_mel(F.pad(waveform, (0, max(0, count * frames * HOP - len(waveform)))))[
                :, : count * frames
            ]
        else:
            mel = self.log_mel(waveform)
            mel = F.pad(mel, (0, count * frames - mel.shape[1]))
        return mel.unflatten(1, (count, frames)).transpose(0, 1)

    @torch.no_grad()
    def speech_tokens(self, waveform, batch_size=8):
        """Samples [n] → speech tokens [windows · compression_size, llm width]."""
        parts = self.windows(waveform).to(self.dtype).split(batch_size)
        return torch.cat(
            [self.hfq_former(self.encoder(part).last_hidden_state).flatten(0, 1) for part in parts]
        )

    # ---------------------------------------------------------------------------------------------------- prompt and text

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.config._name_or_path, config=self.config.text_config
            )
        return self._tokenizer

    def prompt_ids(self, task="asr", instruction=None):
        """Ids [t] of a prompt, with <|AUDIO|> as one id. task None: a prompt of text alone."""
        content = instruction
        if task is not None:
            token, words = TASKS[task]
            content = f"{token}{AUDIO_BOS}{AUDIO}{AUDIO_EOS}\n{instruction or words}"
        turns = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return torch.tensor(
            self.tokenizer(text, add_special_tokens=False)["input_ids"], device=self.device
        )

    def embed(self, input_ids, speech=None):
        """Ids [t] → embeddings [1, t', d]; speech tokens take the place of <|AUDIO|>."""
        embeddings = self.llm.get_input_embeddings()(input_ids.to(self.device))
        if speech is not None:
            at = (input_ids == self.tokenizer.convert_tokens_to_ids(AUDIO)).nonzero()
            if len(at) != 1:
                raise ValueError(f"the prompt holds {AUDIO} {len(at)} times; it is needed once")
            embeddings = torch.cat(
                [embeddings[: at[0, 0]], speech.to(embeddings.dtype), embeddings[at[0, 0] + 1 :]]
            )
        return embeddings[None]

    def use_lora(self, enabled):
        for module in self.llm.modules():
            if isinstance(module, LoRALinear):
                module.enabled = enabled

    def forward(self, input_ids, waveform=None, **kwargs):
        """Logits [1, t', vocabulary] for the ids [t] of one prompt; without audio LoRA is off, and the model is its base."""
        self.use_lora(waveform is not None)
        speech = None if waveform is None else self.speech_tokens(waveform)
        output = self.llm(inputs_embeds=self.embed(input_ids, speech), **kwargs)
        return CausalLMOutputWithPast(logits=output.logits, past_key_values=output.past_key_values)

    @torch.no_grad()
    def generate_ids(self, input_ids, waveform=None, **generation):
        """New ids [n] after a prompt; keywords are those of `generate`. by default greedy, and the limit grows with the audio."""
        self.use_lora(waveform is not None)
        embeddings = self.embed(
            input_ids, None if waveform is None else self.speech_tokens(waveform)
        )
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device)
        ids = self.tokenizer
        seconds = 0 if waveform is None else len(waveform) / SAMPLE_RATE
        defaults = {
            "do_sample": False,
            "max_new_tokens": max(512, 64 + int(6 * seconds)),
            "pad_token_id": ids.pad_token_id,
        }
        defaults["eos_token_id"] = ids.convert_tokens_to_ids("<|im_end|>")
        return self.llm.generate(
            inputs_embeds=embeddings, attention_mask=mask, **(defaults | generation)
        )[0]

    def transcribe(self, waveform, task="asr", instruction=None, **generation):
        """Samples [n] at 16 kHz → text."""
        ids = self.generate_ids(self.prompt_ids(task, instruction), waveform, **generation)
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
