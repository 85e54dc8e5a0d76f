"""Stage 1, full size: ASR on utterances of up to 30 s.

    python train.py --config=configs/stage1_shortform.py --workdir=/mnt/shared/stage1 \\
        --config.data.train.asr.path=DIR/train.jsonl

Recipe: Whisper-large-v3 and Qwen3-4B are frozen in bfloat16; the HFQ-Former (56 M parameters) and
LoRA (33 M) are trained. A row of 8 windows has up to 8 utterances; a step of 64 rows is up to 4.3
hours of audio. The paper gives no optimizer settings: these are a starting point.
Hardware: as configured, 16 TPU v5e chips with 4 rows each (docs/tpu_plan.md; compiled, not run).
Time and metrics: not measured.
"""

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.full_size()
    config.name = "stage1-shortform"
    config.data.train.asr = config_lib.source("data/asr/train.jsonl", ("asr",))
    config.data.dev = "data/asr/dev.jsonl"
    config.data.row.update({"windows": 8, "tokens": 1536, "labels": 1024})
    config.global_batch_size = 64
    config.mesh.update({"data": -1, "fsdp": 16})
    config.model.update({"remat": "attention,query,key,value,out", "window_batch": 4})
    config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 1000})
    config.steps = 20_000
    config.eval.sets.test = "data/asr/test.jsonl"
    config.lock()
    return config
