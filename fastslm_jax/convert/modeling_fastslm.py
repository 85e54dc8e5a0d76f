"""FastSLM in PyTorch: log-mel → Whisper encoder → HFQ-Former → decoder (arXiv 2601.06199).

Every exported folder has a copy of this file and of those that it imports:

    model = AutoModelForSpeechSeq2Seq.from_pretrained(FOLDER, trust_remote_code=True)
    text = model.transcribe(waveform)  # float samples at 16 kHz, of any length

Shapes: b windows or prompts; t, s frames or tokens; d width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from .configuration_fastslm import FastSLMConfig
from .feature_extraction_fastslm import FastSLMFeatureExtractor
from .processing_fastslm import FastSLMProcessor

WINDOW_BATCH = 8  # windows that are encoded at a time


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

    There is an output projection, but by default no query, key or value projection.
    """

    def __init__(
        self, num_queries: int, context: int, width: int, num_heads: int, has_projections: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(num_queries, width))
        # Sinusoids. As in Whisper, they are parameters, which every server loads from the file.
        self.query_positions = nn.Parameter(torch.empty(num_queries, width), requires_grad=False)
        self.context_positions = nn.Parameter(torch.empty(context, width), requires_grad=False)
        self.query_norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_projection, self.key_projection, self.value_projection = (
            nn.Linear(width, width) if has_projections else nn.Identity() for _ in range(3)
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = (self.query_norm(self.query) + self.query_positions).expand(len(x), -1, -1)
        value = self.context_norm(x)
        key = value + self.context_positions
        query, key = self.query_projection(query), self.key_projection(key)
        return self.out(attend(query, key, self.value_projection(value), self.num_heads))


class Downsampler(nn.Module):
    """Divides the time resolution: [b, t, d] → [b, t / factor, d]."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=factor, padding=1)
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
            lengths.append(-(-lengths[-1] // config.downsample_factor))
        self.downsamplers = nn.ModuleList(
            Downsampler(width, config.downsample_factor) for _ in stages[1:]
        )
        options = (width, num_heads, config.compressor_projections)
        self.compressors = nn.ModuleList(
            Compressor(n, t, *options) for n, t in zip(stages, lengths, strict=True)
        )
        self.semantic_distillation = Compressor(config.compression_size, sum(stages), *options)
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


class FastSLMPreTrainedModel(PreTrainedModel):
    config_class = FastSLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    _no_split_modules = [  # noqa: RUF012
        *("Qwen3DecoderLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer", "WhisperEncoderLayer")
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Compressor):
            init.normal_(module.query, std=0.02)
            for positions in (module.query_positions, module.context_positions):
                init.copy_(positions, sinusoids(*positions.shape))


class FastSLMModel(FastSLMPreTrainedModel):
    """FastSLM without the output head: what vLLM serves."""

    def __init__(self, config: FastSLMConfig) -> None:
        super().__init__(config)
        self.audio_tower = WhisperEncoder(config.audio_config)
        self.hfq_former = HFQFormer(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        num_audio_tokens: torch.Tensor | None = None,
        return_dict: bool = True,
        **_,
    ) -> BaseModelOutputWithPooling | tuple:
        """Log-mel [recordings, bands, frames] → speech tokens as `pooler_output` [tokens, d].

        Args:
            num_audio_tokens: [recordings]; the windows after them are padding. None: no padding.
        """
        windows = input_features.unflatten(2, (-1, self.config.window_frames)).transpose(1, 2)
        if num_audio_tokens is None:
            windows = windows.flatten(0, 1)
        else:
            counts = (num_audio_tokens // self.config.compression_size).tolist()
            windows = torch.cat([part[:n] for part, n in zip(windows, counts, strict=True)])
        windows = windows.to(self.audio_tower.conv1.weight)  # its device and dtype
        tokens = torch.cat(
            [
                self.hfq_former(self.audio_tower(part).last_hidden_state)
                for part in windows.split(WINDOW_BATCH)
            ]
        )
        output = BaseModelOutputWithPooling(tokens, tokens.flatten(0, 1))
        return output if return_dict else output.to_tuple()

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, audio_features: torch.Tensor
    ) -> torch.Tensor:
        """Where speech tokens replace text: bool, the shape of inputs_embeds [b, t, d].

        Raises:
            ValueError: the prompts have more or fewer <|AUDIO|> than there are speech tokens.
        """
        mask = input_ids == self.config.audio_token_id
        if mask.sum() != len(audio_features):
            raise ValueError(
                f"the prompts have {mask.sum()} <|AUDIO|> tokens, the audio has "
                f"{len(audio_features)} speech tokens; make both with the processor"
            )
        return mask[..., None].expand_as(inputs_embeds)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        num_audio_tokens: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Prompts [b, t] → hidden states [b, t, d].

        Args:
            input_features, num_audio_tokens: see `get_audio_features`. Without audio, LoRA is off.
            inputs_embeds: [b, t, d] instead of input_ids.
            **kwargs: passed to the language model, such as attention_mask.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "FastSLM needs a prompt with the audio: use the processor, or "
                    'pipeline("automatic-speech-recognition", model=FOLDER, trust_remote_code=True)'
                )
            self._switch_lora(input_ids, input_features, kwargs)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if input_features is not None:
                speech = self.get_audio_features(input_features, num_audio_tokens).pooler_output
                mask = self.get_placeholder_mask(input_ids, inputs_embeds, speech)
                inputs_embeds = inputs_embeds.masked_scatter(mask, speech.to(inputs_embeds))
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

    def _switch_lora(
        self, input_ids: torch.Tensor, input_features: torch.Tensor | None, kwargs: dict
    ) -> None:
        """Turns a separate LoRA on for prompts with audio, and off for those without."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # depends on the version
        if not self.config.has_adapter or (cache is not None and cache.get_seq_length()):
            return
        has_audio = input_features is not None
        layers = [part for part in self.language_model.modules() if hasattr(part, "lora_A")]
        if has_audio and not layers:
            raise ImportError(
                "the LoRA of this FastSLM is in adapter_model.safetensors and was not loaded; "
                "run `pip install peft`, or export with --merge_lora"
            )
        if has_audio and not (input_ids == self.config.audio_token_id).any(-1).all():
            raise ValueError(
                "prompts with and without audio in one batch: LoRA applies to prompts with audio "
                "only; run them separately"
            )
        for layer in layers:
            if layer.disable_adapters == has_audio:
                layer.enable_adapters(has_audio)


class FastSLMForConditionalGeneration(FastSLMPreTrainedModel, GenerationMixin):
    """FastSLM: prompts with recordings of any length → text."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: FastSLMConfig) -> None:
        super().__init__(config)
        self.model = FastSLMModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._processor = None
        self.post_init()

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling | tuple:
        return self.model.get_audio_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        num_audio_tokens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [b, t, vocabulary]; see `FastSLMModel.forward`.

        Args:
            labels: [b, t], the input_ids to predict, -100 elsewhere; adds `loss`.
            logits_to_keep: last positions to compute logits for, or their indices. 0: all.
        """
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            num_audio_tokens=num_audio_tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(outputs.last_hidden_state[:, kept]), None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **others)
        return output if return_dict else output.to_tuple()

    def generate(self, *args, **kwargs) -> torch.Tensor:
        """See `GenerationMixin.generate`. The default limit of tokens grows with the audio."""
        features = kwargs.get("input_features")
        limits = ("max_new_tokens", "max_length", "generation_config")
        if features is not None and not any(kwargs.get(name) for name in limits):
            kwargs["max_new_tokens"] = max(512, 64 + 6 * features.shape[-1] // 100)
        return super().generate(*args, **kwargs)

    # ---- From waveform to text ----

    @property
    def processor(self) -> FastSLMProcessor:
        """The processor in the folder of the model."""
        if self._processor is None:
            folder = self.config._name_or_path
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            extractor = FastSLMFeatureExtractor.from_pretrained(folder)
            self._processor = FastSLMProcessor(extractor, tokenizer, tokenizer.chat_template)
        return self._processor

    @torch.no_grad()
    def transcribe(
        self,
        waveform: str | torch.Tensor | np.ndarray,
        task: str = "asr",
        instruction: str | None = None,
        **generation,
    ) -> str:
        """A file, or samples [n] at 16 kHz → text.

        Args:
            task: "asr", "ast", "ssum" or "sqqa".
            instruction: replaces the task's own instruction.
            **generation: passed to `generate`.
        """
        inputs = self.processor.apply_transcription_request(waveform, task, instruction)
        tokens = self.generate(**inputs.to(self.device), **generation)[0]
        new = tokens[inputs["input_ids"].shape[1] :]
        return self.processor.decode(new, skip_special_tokens=True).strip()
