"""Stage 2, full size: ASR on recordings of 1 to 15 minutes, joined from clips.

    python train.py --config=configs/stage2_longform.py[:random|speaker|recording|semantic] \\
        --workdir=/mnt/shared/stage2 --config.init_from=/mnt/shared/stage1

The argument is the grouping of clips, which the paper does not specify. A row of 30 windows is 15
minutes of audio, one long recording or several shorter ones; a step of 64 rows is 16 hours.
Optimizer: borrowed as in stage 1 (configs/stage1_shortform.py names the sources), but for the two
rates, which are starting points without a source: 1e-4 for the HFQ-Former, which is trained by now,
and 5e-5 for LoRA.
Hardware: as configured, 64 TPU v5e chips with one row each; plan for others with
`python -m fastslm_jax.plan` (docs/tpu_plan.md).
Time and metrics: not measured.
"""

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib


def get_config(grouping: str = "random") -> ConfigDict:
    config = config_lib.full_size()
    config.name = f"stage2-longform-{grouping}"
    config.init_from = "runs/stage1"
    join = {"min_seconds": 60.0, "max_seconds": 900.0, "grouping": grouping}
    config.data.train.long = config_lib.source("data/asr/train.jsonl", ("asr",), join=join)
    config.data.dev = "data/asr/dev_long.jsonl"
    config.data.row.update({"windows": 30, "tokens": 6144, "labels": 4608})
    config.global_batch_size = 64
    config.mesh.update({"data": -1, "fsdp": 16})
    config.model.update({"remat": "attention,query,key,value,out", "window_batch": 10})
    config.optimizer.update({"learning_rate": 1e-4, "weight_decay": 1e-3, "warmup_steps": 500})
    config.optimizer.learning_rate_ratios = ((r"llm/.*", 0.5),)  # LoRA: 5e-5
    config.steps = 10_000
    config.eval.sets.test_long = "data/asr/test_long.jsonl"
    config.lock()
    return config
