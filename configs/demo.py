"""The demo: all three stages on a synthetic corpus, small enough for two CPU cores.

    make demo

It makes the corpus, trains the stages and evaluates them. One stage by hand:

    python train.py --config=configs/demo.py:1 --workdir=runs/demo/stage1

Hardware: two CPU cores, or one GPU or TPU. Time: about 10 minutes for everything on two cores.
Result: about 1 % WER on short and 2 % WER on long recordings (README.md).
The corpus is synthetic (`python -m fastslm_jax.demo.corpus --out=runs/demo/corpus`); the small
pretrained models are in assets/.
"""

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib


def get_config(arg: str = "1") -> ConfigDict:
    """arg: STAGE or STAGE,FOLDER. FOLDER (default runs/demo) contains corpus/, stage1/, …"""
    stage, _, folder = arg.partition(",")
    folder = folder or "runs/demo"
    config = config_lib.small_size()
    config.name = f"demo-stage{stage}"
    corpus = f"{folder}/corpus"
    config.data.dev = f"{corpus}/dev.jsonl"
    optimizer = config.optimizer
    optimizer.update({"name": "muon", "adam_learning_rate_ratio": 0.4, "b2": 0.99})
    optimizer.update({"schedule": "linear", "final_fraction": 0.05, "warmup_steps": 30})
    # Muon's steps are too large for the branches of detail recovery and of Q-Formers, which start
    # near zero, and for LoRA, whose product is scaled by alpha / rank. With a larger ratio for LoRA
    # the decoder loses its place in long transcripts (48 s after stage 3: 9.3 % WER at 0.1, 6.1 %
    # at 0.03).
    lora = {"1": 0.01, "2": 0.1, "3": 0.05}.get(stage)
    optimizer.learning_rate_ratios = (
        (r"llm/.*", lora),
        (r"hfq_former/detail_recovery_.*/out/.*", 0.1),
        (r"adapter/layer_(0/self|[1-9]/.*)_attention/out/.*", 0.1),
    )
    # On CPUs, the random bits of dropout would take a fifth of a step.
    config.model.lora.dropout = 0.0
    config.log_every, config.checkpoint_every, config.data.dev_utterances = 10, 100, 40
    long = {"min_seconds": 12.0, "max_seconds": 48.0, "grouping": "random"}
    config.input_token_noise = 0.0 if stage == "1" else 0.04
    if stage == "1":
        # Joined clips of up to 23 s fill windows to their end. Single clips end before their
        # window does, so the last speech tokens of a window would never represent speech.
        join = {"min_seconds": 8.0, "max_seconds": 23.0, "grouping": "random"}
        config.data.train.asr = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.45)
        config.data.train.spoken = config_lib.source(
            f"{corpus}/train_transcripts.jsonl", ("asr",), 0.2
        )
        config.data.train.joined = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.35, join)
        config.data.row.update({"windows": 4, "tokens": 256, "labels": 96})
        config.global_batch_size, config.steps, config.eval_every = 2, 400, 200
        config.checkpoint_every = 150
        optimizer.learning_rate = 1e-2
    elif stage == "2":
        config.init_from = f"{folder}/stage1"
        config.data.train.long = config_lib.source(f"{corpus}/train.jsonl", ("asr",), join=long)
        config.data.row.update({"windows": 8, "tokens": 320, "labels": 160})
        config.global_batch_size, config.steps, config.eval_every = 1, 240, 120
        optimizer.learning_rate = 5e-3
    elif stage == "3":
        config.init_from = f"{folder}/stage2"
        for task, weight in (("asr", 0.05), ("ast", 0.14), ("ssum", 0.08), ("sqqa", 0.63)):
            config.data.train[task] = config_lib.source(f"{corpus}/train.jsonl", (task,), weight)
        config.data.train.long = config_lib.source(
            f"{corpus}/train.jsonl", ("asr",), 0.1, {**long, "max_seconds": 30.0}
        )
        config.data.row.update({"windows": 8, "tokens": 448, "labels": 144})
        config.global_batch_size, config.steps, config.eval_every = 1, 600, 300
        optimizer.learning_rate = 6e-3
        config.data.dev_tasks = ("asr", "ast", "ssum", "sqqa")
    else:
        raise ValueError(f"configs/demo.py has stages 1, 2 and 3, not {stage!r}")
    for name in ("test", "test_unseen_voices", "test_long"):
        config.eval.sets[name] = f"{corpus}/{name}.jsonl"
    config.lock()
    return config
