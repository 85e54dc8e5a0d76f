"""Stage 1, full size: ASR on utterances of up to 30 s.

    python train.py --config=configs/stage1_shortform.py --workdir=/mnt/shared/stage1 \\
        --config.data.train.asr.path=DIR/train.jsonl

Recipe: Whisper-large-v3 and Qwen3-4B are frozen in bfloat16; the HFQ-Former (56 M parameters) and
LoRA (33 M) are trained. A row of 8 windows has up to 8 utterances; a step of 64 rows is up to 4.3
hours of audio.

From the paper: the stages, their data, and what is trained. It gives no optimizer settings. These
are borrowed from published recipes that train an adapter and LoRA between frozen models:
    AdamW with β 0.9 and 0.98, weight decay 1e-3, cosine decay, gradients clipped at 1: NeMo's SALM
        (github.com/NVIDIA/NeMo, examples/speechlm2/conf/salm.yaml; its adapter: 3e-4, no warmup)
    warmup of 1 000 steps, and 1e-4: SLAM-LLM on Whisper-large-v3 (github.com/X-LANCE/SLAM-LLM,
        examples/asr_librispeech/scripts/finetune_whisper_large_linear_vicuna_7b.sh; its projector)
    separate learning rates of adapter and LoRA: LLaVA-1.5 (github.com/haotian-liu/LLaVA,
        scripts/v1_5/finetune_lora.sh)
The rate of the HFQ-Former, 5e-4, has no single source: it starts from random values, and NeMo's
adapter has 3e-4. None of these settings has been tuned for this model.
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
    config.optimizer.update({"learning_rate": 5e-4, "weight_decay": 1e-3, "warmup_steps": 1000})
    config.optimizer.learning_rate_ratios = ((r"llm/.*", 0.2),)  # LoRA: 1e-4
    config.steps = 20_000
    config.eval.sets.test = "data/asr/test.jsonl"
    config.lock()
    return config
