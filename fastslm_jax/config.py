"""The fields of every config, with their defaults for the full-size model.

A config starts from `full_size` or `small_size` and changes what it needs (see configs/).
"""

from ml_collections import ConfigDict

# What is trained: the HFQ-Former with its projection, and LoRA. The first match decides.
TRAINABLE = (
    (r".*_positions|encoder/positions", False),
    (r"hfq_former/.*", True),
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
    fields = {"path": path, "tasks": tasks, "weight": weight}
    return ConfigDict(fields | ({"join": join} if join else {}))


def full_size() -> ConfigDict:
    """FastSLM-4B: Whisper-large-v3, HFQ-Former (80, 80, 80 → 50 tokens), Qwen3-4B with LoRA."""
    config = ConfigDict()
    config.name = "fastslm"  # label of the progress bar
    config.seed = 0  # of initialization, data order, dropout and token noise
    config.base = ConfigDict(  # pretrained weights: Hugging Face names or folders
        {"whisper": "openai/whisper-large-v3", "llm": "Qwen/Qwen3-4B-Instruct-2507"}
    )
    config.init_from = ""  # workdir of the previous stage, whose newest checkpoint is the start
    config.model = ConfigDict(
        {
            "stage_tokens": (80, 80, 80),  # queries of each HFQ-Former compression stage
            "compression_size": 50,  # speech tokens of a window
            "detail_recovery_layers": 2,  # of the HFQ-Former
            "query_init": "normal",  # "temporal": queries with a temporal alignment prior
            "lora": {"rank": 16, "alpha": 64.0, "dropout": 0.01},
            "audio_padding": "released",  # of the last window: "released" or "whisper"
            "window_batch": 0,  # maximum windows of a row in the encoder at a time; 0 for all
            "attention": "auto",  # or a kernel of models/attention.py
            "remat": "full",  # none, full, dots, or names to keep; see models/layers.py
            "scan_layers": True,  # False unrolls: faster for small models, slower to compile
            "dtype": "bfloat16",  # of activations
            "base_dtype": "bfloat16",  # of the pretrained weights
        }
    )
    config.data = ConfigDict(
        {
            "train": {},  # {name: source(...)}
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
            "warmup_steps": 500,
            "weight_decay": 0.01,
            "b1": 0.9,
            "b2": 0.98,
            "clip_norm": 1.0,  # of the global gradient norm; 0 for no clipping
        }
    )
    config.steps = 10_000  # of the whole run
    config.log_every = 20  # steps between lines of metrics
    config.eval_every = 1000  # steps between dev evaluations
    config.checkpoint_every = 500  # steps between checkpoints
    config.keep_checkpoints = 2  # newest checkpoints to keep, besides the best one
    config.profile = ""  # "5:8" writes a trace of steps 5 to 8 to WORKDIR/profile
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
