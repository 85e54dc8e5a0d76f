"""A small model of public weights: Whisper base, an HFQ-Former, and SmolLM2-135M with LoRA.

    python train.py --config=configs/real_small.py:1,FOLDER --workdir=FOLDER/stage1

FOLDER has the speech of docs/real_model.md, which tells how it was made: corpus/ (prompts and
examples of WordNet), with train_questions.jsonl, definitions/ (WordNet's definitions), and words/
(single words); for eval.py also pico/, people/ and no_speech/.
Without a network, name folders of the weights: --config.base.whisper=DIR --config.base.llm=DIR.

Hardware: one H100, 48 ms a step. On CPUs, add --config.model.dtype=float32
--config.model.base_dtype=float32 --config.data.workers=0.
"""

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib


def get_config(arg: str = "1") -> ConfigDict:
    """arg: STAGE or STAGE,FOLDER (default runs/real)."""
    stage, _, folder = arg.partition(",")
    folder = folder or "runs/real"
    config = config_lib.small_size()
    config.name = f"real-small-stage{stage}"
    config.base.whisper = "openai/whisper-base"
    config.base.llm = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # Clips are short: windows of 6 s cost a fifth of Whisper's 30 s. 30 tokens a window are about
    # one for each token of text: so small a language model does not untangle more.
    config.model.update({"window_seconds": 6.0, "compression_size": 30, "scan_layers": True})
    config.model.stage_tokens = (60, 60, 30)
    config.model.update({"dtype": "bfloat16", "base_dtype": "bfloat16"})
    config.model.chat_template = "chatml"  # without SmolLM2's system prompt: 21 tokens fewer
    config.model.lora.dropout = 0.0
    config.input_token_noise = 0.05
    config.spec_augment.update({"freq_masks": 2, "freq_width": 12, "time_masks": 2})
    config.spec_augment.time_width = 0.05  # 0.3 s
    config.data.row.update({"windows": 16, "tokens": 1024, "labels": 448})
    config.data.update({"workers": 12, "prefetch": 4})
    config.global_batch_size = 4
    corpus, words = f"{folder}/corpus", f"{folder}/words"
    definitions = f"{folder}/definitions/train.jsonl"
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
    config.log_every, config.checkpoint_every, config.eval_every = 10, 500, 1000
    for name, path in (
        ("synthetic", f"{corpus}/dev.jsonl"),
        ("synthetic_questions", f"{corpus}/dev_questions.jsonl"),
        ("unseen_engine", f"{folder}/pico/train.jsonl"),
        ("people", f"{folder}/people/manifest.jsonl"),
        ("people_questions", f"{folder}/people/manifest_questions.jsonl"),
        ("no_speech", f"{folder}/no_speech/manifest.jsonl"),
    ):
        config.eval.sets[name] = path
    sources = config.data.train
    # Joined clips fill windows to their end: the last tokens of a window represent speech, too.
    join = {"min_seconds": 5.0, "max_seconds": 11.9, "grouping": "random"}
    if stage == "1":
        config.init_from = f"{folder}/fitted"  # fastslm_jax.training.fit_projection
        sources.single = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.15)
        sources.words = config_lib.source(f"{words}/train.jsonl", ("asr",), 0.1)
        sources.joined = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.25, join)
        sources.definitions = config_lib.source(definitions, ("asr",), 0.5, join)
        config.steps, optimizer.learning_rate, optimizer.warmup_steps = 7000, 1e-2, 200
    elif stage == "2":
        config.init_from = f"{folder}/stage1"
        sources.single = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.2)
        sources.words = config_lib.source(f"{words}/train.jsonl", ("asr",), 0.1)
        sources.definitions = config_lib.source(definitions, ("asr",), 0.3, join)
        long = {**join, "min_seconds": 11.0, "max_seconds": 30.0}
        sources.long = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.4, long)
        config.steps, optimizer.learning_rate = 1000, 4e-3
    elif stage == "3":
        config.init_from = f"{folder}/stage2"
        sources.single = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.2)
        sources.words = config_lib.source(f"{words}/train.jsonl", ("asr",), 0.1)
        long = {**join, "max_seconds": 30.0}
        sources.long = config_lib.source(f"{corpus}/train.jsonl", ("asr",), 0.3, long)
        sources.questions = config_lib.source(f"{corpus}/train_questions.jsonl", ("sqqa",), 0.4)
        config.data.dev_tasks = ("asr",)
        config.steps, optimizer.learning_rate = 1000, 4e-3
    else:
        raise ValueError(f"configs/real_small.py has stages 1, 2 and 3, not {stage!r}")
    config.lock()
    return config
