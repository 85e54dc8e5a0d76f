"""Types and allowed ranges of the fields of a config, which are explained in `config`."""

import re
from typing import Annotated, Literal

import pydantic
from pydantic import AfterValidator, Field


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"should be a regular expression ({error})") from None
    return pattern


def _span(steps: str) -> str:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", steps)
    if steps and (not match or not 1 <= int(match[1]) <= int(match[2])):
        raise ValueError("should be FIRST:LAST, two step numbers such as 5:8")
    return steps


def _axis(size: int) -> int:
    if size == 0:
        raise ValueError("should be at least 1, or -1 for the devices that are left")
    return size


Count = Annotated[int, Field(ge=1, lt=1 << 31)]
CountOrZero = Annotated[int, Field(ge=0, lt=1 << 31)]
Slots = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[^/\\.\x00][^/\\\x00]*$")]  # also a folder's name
Pattern = Annotated[str, AfterValidator(_compiled)]
Layers = Annotated[int, Field(ge=0, le=100)]
DownsampleFactor = Annotated[int, Field(ge=1, le=5)]
Rank = Annotated[int, Field(ge=0, le=65_536)]
AudioPadding = Literal["released", "whisper"]
Dtype = Literal["float32", "bfloat16", "float16"]
AxisSize = Annotated[int, Field(ge=-1, lt=1 << 31), AfterValidator(_axis)]


class Fields(pydantic.BaseModel):
    """Base: types are strict, numbers finite, and there are no other fields."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, extra="forbid", protected_namespaces=()
    )


class Base(Fields):
    whisper: Text
    llm: Text


class Lora(Fields):
    rank: Rank
    alpha: NotNegative
    dropout: BelowOne


class Model(Fields):
    stage_tokens: Annotated[tuple[Slots, ...], Field(min_length=1, max_length=8)]
    compression_size: Annotated[int, Field(ge=0, le=1_000_000)]
    detail_recovery_layers: Layers
    query_init: Literal["normal", "temporal"]
    lora: Lora
    audio_padding: AudioPadding
    window_batch: CountOrZero
    attention: str
    remat: str
    scan_layers: bool
    dtype: Dtype
    base_dtype: Dtype
    # Fields with a default are missing in older checkpoints.
    chat_template: Literal["", "chatml"] = ""
    window_seconds: NotNegative = 0.0
    adapter: Literal["hfq", "pooling", "stack", "wq_former", "sq_former"] = "hfq"
    adapter_mlp_dim: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    qformer_layers: Annotated[int, Field(ge=1, le=100)] = 2
    downsample_factor: DownsampleFactor = 2
    compressor_projections: bool = False


class Join(Fields):
    min_seconds: Positive
    max_seconds: Positive
    grouping: Literal["random", "speaker", "recording", "semantic"] = "random"
    distribution: Literal["uniform", "log_uniform"] = "uniform"
    gap_seconds: tuple[NotNegative, NotNegative] = (0.0, 0.0)

    @pydantic.model_validator(mode="after")
    def _check_ranges(self) -> "Join":
        if self.min_seconds > self.max_seconds or self.gap_seconds[0] > self.gap_seconds[1]:
            raise ValueError("ranges should go from the smaller to the larger number")
        return self


class Source(Fields):
    path: Text
    tasks: tuple[str, ...] = ()
    weight: NotNegative = 1.0
    join: Join | None = None


class Row(Fields):
    windows: Slots
    tokens: Slots
    labels: Slots


class Data(Fields):
    train: dict[Name, Source]
    dev: str
    dev_tasks: tuple[str, ...]
    dev_utterances: Count
    row: Row
    workers: Annotated[int, Field(ge=0, le=1024)]
    prefetch: Annotated[int, Field(ge=1, le=10_000)]


class SpecAugment(Fields):
    freq_masks: Annotated[int, Field(ge=0, le=100)] = 0
    freq_width: Annotated[int, Field(ge=0, le=1_000)] = 0
    time_masks: Annotated[int, Field(ge=0, le=100)] = 0
    time_width: Fraction = 0.0

    @pydantic.model_validator(mode="after")
    def _check_widths(self) -> "SpecAugment":
        if (self.freq_masks and not self.freq_width) or (self.time_masks and not self.time_width):
            raise ValueError("masks should have a width: freq_width, time_width")
        return self


class Mesh(Fields):
    data: AxisSize
    fsdp: AxisSize
    tensor: AxisSize


class Optimizer(Fields):
    name: Literal["adamw", "muon"]
    learning_rate: Positive
    adam_learning_rate_ratio: NotNegative
    learning_rate_ratios: tuple[tuple[Pattern, NotNegative], ...]
    schedule: Literal["cosine", "linear", "constant"]
    final_fraction: Fraction
    warmup_steps: CountOrZero
    weight_decay: NotNegative
    b1: BelowOne
    b2: BelowOne
    clip_norm: NotNegative


class Eval(Fields):
    sets: dict[Name, str]
    batch_size: Count


class Config(Fields):
    name: str
    seed: Annotated[int, Field(ge=0, lt=1 << 32)]
    base: Base
    init_from: str
    init_from_step: Annotated[str, Field(pattern=r"^(best|[0-9]{1,9})?$")] = ""
    model: Model
    data: Data
    global_batch_size: Slots
    accumulate: Slots
    loss_chunk: Count
    input_token_noise: Fraction
    spec_augment: SpecAugment = SpecAugment()
    mesh: Mesh
    trainable: Annotated[tuple[tuple[Pattern, bool], ...], Field(min_length=1)]
    optimizer: Optimizer
    steps: Count
    log_every: Count
    eval_every: Count
    checkpoint_every: Count
    keep_checkpoints: Count
    profile: Annotated[str, AfterValidator(_span)]
    wandb: Annotated[str, Field(pattern=r"^[^/\\#?%:]{0,128}$")] = ""  # W&B allows no others
    max_skipped: Count
    eval: Eval
