"""A small model of public weights: Whisper base, an HFQ-Former, and SmolLM2-135M with LoRA.

    python train.py --config=configs/real_small.py:1,FOLDER --workdir=FOLDER/stage1

FOLDER/corpus has train.jsonl and dev.jsonl, such as `python -m fastslm_jax.synthesis` writes
(docs/synthesis.md). Without a network, name folders of the weights:
--config.base.whisper=DIR --config.base.llm=DIR.

Hardware: two CPU cores and 10 GiB, or any accelerator. Result: not trained to its end yet.
"""

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib


def get_config(arg: str = "1") -> ConfigDict:
    """arg: STAGE or STAGE,FOLDER (default runs/real). Stage 1 has clips, stage 2 joins them."""
    stage, _, folder = arg.partition(",")
    folder = folder or "runs/real"
    config = config_lib.small_size()
    config.name = f"real-small-stage{stage}"
    config.base.whisper = "openai/whisper-base"
    config.base.llm = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # Clips are short: windows of 6 s cost a fifth of Whisper's 30 s. 10 tokens a window.
    config.model.update({"window_seconds": 6.0, "compression_size": 0, "scan_layers": True})
    config.model.chat_template = "chatml"  # without SmolLM2's system prompt: 21 tokens fewer
    config.model.lora.dropout = 0.0
    corpus = f"{folder}/corpus"
    config.data.dev = f"{corpus}/dev.jsonl"
    optimizer = config.optimizer
    # Muon's steps are too large for LoRA, whose product is scaled by alpha / rank, and for the
    # branches of detail recovery and of Q-Formers, which start near zero.
    optimizer.update({"name": "muon", "adam_learning_rate_ratio": 0.4, "b2": 0.99})
    optimizer.update({"schedule": "linear", "final_fraction": 0.05, "warmup_steps": 100})
    optimizer.learning_rate_ratios = (
        (r"llm/.*", 0.02),
        (r"hfq_former/detail_recovery_.*/out/.*", 0.1),
        (r"adapter/layer_(0/self|[1-9]/.*)_attention/out/.*", 0.1),
    )
    config.log_every, config.checkpoint_every, config.eval_every = 10, 100, 500
    if stage == "1":
        config.data.train.single = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.5)
        config.data.train.joined = config_lib.source(  # more speech per window and per prompt
            f"{corpus}/train.jsonl", ("asr",), 0.5, {"min_seconds": 5.0, "max_seconds": 11.0}
        )
        config.data.row.update({"windows": 4, "tokens": 192, "labels": 96})
        config.global_batch_size, config.steps = 2, 6000
        optimizer.learning_rate = 1e-2
    elif stage == "2":
        config.init_from = f"{folder}/stage1"
        config.data.train.speech = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.5)
        config.data.train.joined = config_lib.source(
            f"{corpus}/train.jsonl",
            ("asr",),
            0.5,
            {"min_seconds": 8.0, "max_seconds": 30.0, "grouping": "random"},
        )
        config.data.row.update({"windows": 8, "tokens": 512, "labels": 256})
        config.global_batch_size, config.steps = 1, 2000
        optimizer.learning_rate = 5e-3
    else:
        raise ValueError(f"configs/real_small.py has stages 1 and 2, not {stage!r}")
    config.lock()
    return config
