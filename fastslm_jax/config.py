"""The fields of every config, with their defaults for the full-size model.

A config starts from `full_size` or `small_size` and changes what it needs (see configs/). `check`
holds it against `config_schema`: allowed types and ranges.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from absl import flags
from ml_collections import ConfigDict

from fastslm_jax import config_schema
from fastslm_jax.errors import UserError

# What is trained: the adapter (by default the HFQ-Former) and LoRA. The first match decides.
TRAINABLE = (
    (r".*_positions|encoder/positions", False),
    (r"(hfq_former|adapter)/.*", True),
    (r".*/lora_[ab]", True),
    (r"(encoder|llm)/.*", False),
)


def source(
    path: str, tasks: tuple[str, ...] = (), weight: float = 1.0, join: dict | None = None
) -> ConfigDict:
    """A data source of the training mixture (see docs/data.md).

    Args:
        path: a manifest or an imported folder.
        tasks: the tasks to take from it; all by default.
        weight: its share of the examples, relative to the other sources; 0 leaves it out.
        join: joins clips into long recordings: {min_seconds, max_seconds, grouping, distribution,
            gap_seconds} of `data.longform.LongForm`.
    """
    fields = {
        "path": path,  # a manifest or an imported folder
        "tasks": tasks,  # the tasks to take from it; () for all
        "weight": weight,  # its share of the examples, relative to the other sources; 0 for none
    }
    return ConfigDict(fields | ({"join": join} if join else {}))


def full_size() -> ConfigDict:
    """FastSLM-4B: Whisper-large-v3, HFQ-Former (80, 80, 80 → 50 tokens), Qwen3-4B with LoRA."""
    config = ConfigDict()
    config.name = "fastslm"  # label of the progress bar
    config.seed = 0  # of initialization, data order, dropout and token noise
    config.base = ConfigDict(  # pretrained weights: Hugging Face names or folders
        {"whisper": "openai/whisper-large-v3", "llm": "Qwen/Qwen3-4B-Instruct-2507"}
    )
    config.init_from = ""  # workdir of the previous stage, whose checkpoint is the start
    config.init_from_step = ""  # of that checkpoint: a step, or "best" on its dev set; "": newest
    config.model = ConfigDict(
        {
            "adapter": "hfq",  # a name in models/adapters: pooling, stack, wq_former, sq_former
            "adapter_mlp_dim": 0,  # hidden width of adapters but hfq; 0: as many parameters as hfq
            "qformer_layers": 2,  # of the adapters wq_former and sq_former
            "stage_tokens": (80, 80, 80),  # queries of each scale of the HFQ-Former
            "downsample_factor": 2,  # between the scales of the HFQ-Former
            "compressor_projections": False,  # of queries, keys and values in the HFQ-Former
            "window_seconds": 0.0,  # shorter windows, a multiple of 0.02; 0 for the encoder's own
            "compression_size": 50,  # speech tokens of a window; 0 for 1.67 per second
            "detail_recovery_layers": 2,  # of the HFQ-Former
            "query_init": "normal",  # of adapters; "temporal": with a temporal alignment prior
            "lora": {"rank": 16, "alpha": 64.0, "dropout": 0.01},  # of the language model
            "audio_padding": "released",  # of the last window: "released" or "whisper"
            "window_batch": 0,  # maximum windows of a row in the encoder at a time; 0 for all
            "attention": "auto",  # or a kernel of models/attention.py
            "remat": "full",  # none, full, dots, or names to keep; see models/layers.py
            "scan_layers": True,  # False unrolls: faster for small models, slower to compile
            "dtype": "bfloat16",  # of activations
            "base_dtype": "bfloat16",  # of the pretrained weights
            "chat_template": "",  # the tokenizer's, or "chatml" for one that has none
        }
    )
    config.data = ConfigDict(
        {
            "train": {},  # {name: source(...)}; see `source` above
            "dev": "",  # manifest or imported folder to score during training; "" for none
            "dev_tasks": ("asr",),  # tasks to score
            "dev_utterances": 64,  # maximum utterances per task and language
            "row": {"windows": 32, "tokens": 6144, "labels": 4096},  # slots of a packed row
            "workers": 8,  # processes that decode audio; 0 for threads of the main process
            "prefetch": 8,  # batches prepared in advance
        }
    )
    config.global_batch_size = 16  # rows per step, over all devices
    config.accumulate = 1  # micro-batches per step (gradient accumulation)
    config.loss_chunk = 512  # labels of a row whose logits are computed at a time
    config.input_token_noise = 0.0  # fraction of answer tokens to replace in the decoder's input
    config.spec_augment = ConfigDict(  # masks of each window's log-mel features, in training
        {
            "freq_masks": 0,  # masks over mel bands
            "freq_width": 0,  # largest width of one, in bands
            "time_masks": 0,  # masks over frames
            "time_width": 0.0,  # largest width of one, as a fraction of the window
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # axis sizes; -1: inferred
    config.trainable = TRAINABLE  # (pattern of parameter paths, is trained)
    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # adamw or muon
            "learning_rate": 1e-4,  # at the end of the warmup
            "adam_learning_rate_ratio": 1.0,  # muon: learning rate of Adam relative to Muon's
            "learning_rate_ratios": (),  # (pattern of parameter paths, factor of the update)
            "schedule": "cosine",  # after the warmup: cosine, linear or constant
            "final_fraction": 0.1,  # final learning rate relative to learning_rate
            "warmup_steps": 500,  # in which the learning rate rises from 0
            "weight_decay": 0.01,  # decoupled from the gradient
            "b1": 0.9,  # decay rate of the first moment
            "b2": 0.98,  # decay rate of the second moment
            "clip_norm": 1.0,  # of the global gradient norm; 0 for no clipping
        }
    )
    config.steps = 10_000  # of the whole run
    config.log_every = 20  # steps between lines of metrics
    config.eval_every = 1000  # steps between dev evaluations, each with a checkpoint
    config.checkpoint_every = 500  # steps between checkpoints
    config.keep_checkpoints = 2  # newest checkpoints to keep, besides the best one
    config.profile = ""  # "5:8" writes a trace of steps 5 to 8 to WORKDIR/profile
    config.wandb = ""  # Weights & Biases project for the metrics, too; see docs/training.md
    config.max_skipped = 10  # consecutive non-finite steps that end the run
    config.eval = ConfigDict(
        {
            "sets": {},  # of eval.py: {name: manifest or imported folder}
            "batch_size": 32,  # requests per batch, in eval.py and on the dev set
        }
    )
    return config


def small_size() -> ConfigDict:
    """The demo's model: the small pretrained models in assets/, windows of 6 s with 10 tokens.

    Float32, because CPUs are not faster in bfloat16.
    """
    config = full_size()
    config.base.whisper, config.base.llm = "assets/demo_whisper", "assets/demo_llm"
    config.model.update(
        {
            "stage_tokens": (16, 16, 16),
            "compression_size": 10,
            "query_init": "temporal",
            "remat": "none",
            "scan_layers": False,
            "dtype": "float32",
            "base_dtype": "float32",
        }
    )
    config.data.update({"workers": 0, "prefetch": 4})
    return config


def older_checkpoint_fields() -> dict[str, Any]:
    """The fields that checkpoints of older versions lack, and their values in them."""

    def defaults(schema: type[pydantic.BaseModel]) -> dict[str, Any]:
        fields = schema.model_fields.items()
        found = {name: field.default for name, field in fields if not field.is_required()}
        groups = {name: v for name, v in found.items() if isinstance(v, pydantic.BaseModel)}
        return found | {name: group.model_dump() for name, group in groups.items()}

    return {**defaults(config_schema.Config), "model": defaults(config_schema.Model)}


def from_saved(saved: Mapping, where: str = "config") -> ConfigDict:
    """The config of a checkpoint, checked and with the fields that it is too old to have.

    Args:
        where: what the config is, for error messages.

    Raises:
        UserError: a field is missing or unknown, or its value is not allowed.
    """
    check(saved, where)
    older = older_checkpoint_fields()
    return ConfigDict({**older, **saved, "model": {**older["model"], **saved["model"]}})


def check(config: Mapping | ConfigDict, where: str = "config") -> None:
    """Checks every field before any work.

    Args:
        where: what the config is, for error messages.

    Raises:
        UserError: a field is missing or unknown, or its value is not allowed.
    """
    fields = config.to_dict() if isinstance(config, ConfigDict) else config
    try:
        config_schema.Config.model_validate(_plain(fields))
    except pydantic.ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        raise UserError(_describe(first, where)) from None


def _plain(value: Any) -> Any:
    """Lists as tuples, since JSON has only lists."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _describe(problem: Any, where: str) -> str:
    name = where
    for part in problem["loc"]:
        if part != "[key]":
            name += f"[{part}]" if isinstance(part, int) else f".{part}"
    if problem["type"] in ("missing", "extra_forbidden"):
        what = "is missing" if problem["type"] == "missing" else "is not a field of configs"
        return f"{name} {what}; fastslm_jax/config.py lists the fields"
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    expected = re.sub(r"^(Input|String|Tuple|Value error,) ", "", problem["msg"])
    return f"{name}={shown}: {expected}"


def accept_new_names(arguments: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Lets flags add sources and sets: --config.data.train.NAME.path=… --config.eval.sets.NAME=….

    Call it before the flags are parsed.

    Args:
        arguments: the command line.
    """
    parser = flag_values["config"].parser
    get_config = parser.parse

    def parse(path: str) -> ConfigDict:
        config = get_config(path)
        for argument in arguments:
            match = re.match(r"--?config\.(data\.train|eval\.sets)\.(\w+)", argument)
            if not match:
                continue
            is_source, name = match[1] == "data.train", match[2]
            parent = config.data.train if is_source else config.eval.sets
            if name not in parent:
                with parent.unlocked():
                    parent[name] = source("") if is_source else ""
        return config

    parser.parse = parse
