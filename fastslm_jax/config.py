"""What every experiment has: all fields with their defaults, for the full-size model. Configs change what they need."""

from ml_collections import ConfigDict

# What trains: the HFQ-Former with its projection, and LoRA. First match decides.
TRAINABLE = (
    (r".*_positions|encoder/positions", False),
    (r"hfq_former/.*", True),
    (r".*/lora_[ab]", True),
    (r"(encoder|llm)/.*", False),
)


def source(
    path: str, tasks: tuple[str, ...] = (), weight: float = 1.0, join: dict | None = None
) -> ConfigDict:
    """A manifest or imported folder of the mixture (see data.rows.MixtureSource, docs/data.md).

    join: {min_seconds, max_seconds, grouping, distribution, gap_seconds} of long-form recordings (data.longform.LongForm).
    """
    fields = {"path": path, "tasks": tasks, "weight": weight}
    return ConfigDict(fields | ({"join": join} if join else {}))


def full_size() -> ConfigDict:
    """FastSLM-4B: Whisper-large-v3, HFQ-Former of 80, 80, 80 → 50 tokens, Qwen3-4B with LoRA."""
    config = ConfigDict()
    config.name = "fastslm"
    config.seed = 0
    config.base = ConfigDict(
        {"whisper": "openai/whisper-large-v3", "llm": "Qwen/Qwen3-4B-Instruct-2507"}
    )
    config.init_from = ""  # working directory of the stage before
    config.model = ConfigDict(
        {
            "stage_tokens": (80, 80, 80),
            "compression_size": 50,
            "detail_recovery_layers": 2,
            "query_init": "normal",  # of the HFQ-Former; "temporal" starts from a temporal alignment prior
            "lora": {"rank": 16, "alpha": 64.0, "dropout": 0.01},
            "audio_padding": "released",
            "window_batch": 0,  # windows of a row in the encoder at a time; 0: all
            "attention": "auto",  # kernel: auto, xla, splash (TPU), cudnn (GPU); see models/attention.py
            "remat": "full",  # what the backward pass computes anew: none, full, dots or names to keep; see models/layers.py
            "scan_layers": True,  # one compiled layer in a loop; False: a longer program, faster for small models
            "dtype": "bfloat16",  # of the computation
            "base_dtype": "bfloat16",  # of the frozen weights
        }
    )
    config.data = ConfigDict(
        {
            "train": {},  # name: source(...)
            "dev": "",  # a manifest or imported folder; dev_tasks of it are scored during training
            "dev_tasks": ("asr",),
            "dev_utterances": 64,
            "row": {"windows": 32, "tokens": 6144, "labels": 4096},
            "workers": 8,
            "prefetch": 8,
        }
    )
    config.global_batch_size = 16  # rows of a step, over all devices
    config.accumulate = 1  # micro-batches that a step's rows are run in
    config.loss_chunk = 512
    config.input_token_noise = 0.0  # share of the answers' tokens that the decoder reads wrongly; see steps.with_token_noise
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.trainable = TRAINABLE
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-4,
            "adam_learning_rate_ratio": 1.0,
            "learning_rate_ratios": (),  # (pattern, ratio) of parameters that take smaller or larger steps
            "schedule": "cosine",
            "final_fraction": 0.1,
            "warmup_steps": 500,
            "weight_decay": 0.01,
            "b1": 0.9,
            "b2": 0.98,
            "clip_norm": 1.0,
        }
    )
    config.steps = 10_000
    config.log_every = 20
    config.eval_every = 1000
    config.checkpoint_every = 500
    config.keep_checkpoints = 2
    config.profile = ""  # "5:8" writes a trace of steps 5 to 8 to WORKDIR/profile
    config.max_skipped = 10  # steps in a row without finite gradients before the run stops
    config.eval = ConfigDict(
        {"sets": {}, "batch_size": 32}
    )  # sets: name → manifest or imported folder
    return config


def small_size() -> ConfigDict:
    """The demo's model: the same modules on the small bases under assets/, windows of 6 s with 10 tokens, float32 for CPU."""
    config = full_size()
    config.base.whisper, config.base.llm = "assets/demo_whisper", "assets/demo_llm"
    config.model.update(
        {
            "stage_tokens": (16, 16, 16),
            "compression_size": 10,
            "query_init": "temporal",
            "remat": "none",
        }
    )
    config.model.update({"scan_layers": False, "dtype": "float32", "base_dtype": "float32"})
    config.data.update({"workers": 0, "prefetch": 4})
    return config
