"""Stage 3, full size: instruction tuning on ASR, speech translation, summaries and questions.

    python train.py --config=configs/stage3_instruct.py --workdir=/mnt/shared/stage3 \\
        --config.init_from=/mnt/shared/stage2

A tenth of the examples are long-form ASR, so that the model retains what it learned in stage 2.
Optimizer: borrowed, see stage 1; one rate for the HFQ-Former and LoRA, and a warmup of 3 % of the
steps from LLaVA-1.5 (github.com/haotian-liu/LLaVA, scripts/v1_5/finetune_lora.sh).
Hardware: as configured, 64 TPU v5e chips with one row each; plan for others with
`python -m fastslm_jax.plan` (docs/tpu_plan.md).
Time and metrics: not measured.
"""

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.full_size()
    config.name = "stage3-instruct"
    config.init_from = "runs/stage2"
    for task, weight in (("asr", 0.2), ("ast", 0.3), ("ssum", 0.2), ("sqqa", 0.2)):
        config.data.train[task] = config_lib.source("data/instruct/train.jsonl", (task,), weight)
    join = {"min_seconds": 60.0, "max_seconds": 900.0, "grouping": "random"}
    config.data.train.long = config_lib.source("data/asr/train.jsonl", ("asr",), 0.1, join)
    config.data.dev = "data/instruct/dev.jsonl"
    config.data.dev_tasks = ("asr", "ast", "ssum", "sqqa")
    config.data.row.update({"windows": 30, "tokens": 6144, "labels": 4608})
    config.global_batch_size = 64
    config.mesh.update({"data": -1, "fsdp": 16})
    config.model.update({"remat": "attention,query,key,value,out", "window_batch": 10})
    config.optimizer.update({"learning_rate": 5e-5, "weight_decay": 1e-3, "warmup_steps": 300})
    config.steps = 10_000
    config.eval.sets.test = "data/instruct/test.jsonl"
    config.lock()
    return config
