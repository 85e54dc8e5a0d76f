"""LibriSpeech on one card of 24 or 80 GB.

    python train.py --config=configs/librispeech_finetune.py:large,4b,24 --workdir=runs/librispeech

The argument is ENCODER,LLM,CARD[,FOLDER], see get_config. docs/quickstart_gpu.md has the commands
from download to WER. To start from a trained FastSLM of the same size, add
--config.init_from=WORKDIR.

Recipe: Whisper and Qwen3 are frozen in bfloat16; the HFQ-Former and LoRA are trained. Half of the
examples are single utterances, the others utterances of one speaker joined to 20 to 30 s, so that
windows are used to their end. A step of 16 rows of 8 windows is up to 64 minutes of audio; a card
of 24 GB takes one row at a time, a card of 80 GB four.
Hardware: as configured for 24 GB, one L4 (docs/quickstart_gpu.md; compiled, not run).
Time and metrics: not measured.
"""

from ml_collections import ConfigDict

from fastslm_jax import config as config_lib

ENCODERS = {"large": "openai/whisper-large-v3", "base": "openai/whisper-base"}
LLMS = {
    "4b": "Qwen/Qwen3-4B-Instruct-2507",
    "1.7b": "Qwen/Qwen3-1.7B",
    "0.6b": "Qwen/Qwen3-0.6B",
}
ROWS = {"24": 1, "80": 4}  # {GB of the card: rows at a time}


def get_config(arg: str = "large,4b,24") -> ConfigDict:
    """arg: ENCODER,LLM,CARD[,FOLDER].

    ENCODER is large or base (Whisper), LLM 4b, 1.7b or 0.6b (Qwen3), CARD 24 or 80 (GB). FOLDER
    (default data/librispeech) has the imported train, dev-clean, test-clean and test-other.
    """
    encoder, llm, card, folder = [*arg.split(",", 3), *[""] * 4][:4]
    for name, values in ((encoder, ENCODERS), (llm, LLMS), (card, ROWS)):
        if name not in values:
            raise ValueError(
                f"configs/librispeech_finetune.py:{arg}: {name!r} is not one of "
                f"{', '.join(values)}; expected ENCODER,LLM,CARD[,FOLDER] such as large,4b,24"
            )
    folder = folder or "data/librispeech"
    config = config_lib.full_size()
    config.name = f"librispeech-{encoder}-{llm}"
    config.base.update({"whisper": ENCODERS[encoder], "llm": LLMS[llm]})
    config.model.update({"remat": "attention,query,key,value,out,gate,up", "window_batch": 4})
    config.global_batch_size = 16
    config.accumulate = config.global_batch_size // ROWS[card]
    config.data.train.utterances = config_lib.source(f"{folder}/train", ("asr",), 0.5)
    join = {"min_seconds": 20.0, "max_seconds": 30.0, "grouping": "speaker"}
    config.data.train.joined = config_lib.source(f"{folder}/train", ("asr",), 0.5, join)
    config.data.dev = f"{folder}/dev-clean"
    config.data.row.update({"windows": 8, "tokens": 1536, "labels": 1024})
    # Those of stage 1 (configs/stage1_shortform.py has their sources).
    config.optimizer.update({"learning_rate": 5e-4, "weight_decay": 1e-3, "warmup_steps": 1000})
    config.optimizer.learning_rate_ratios = ((r"llm/.*", 0.2),)  # LoRA: 1e-4
    config.steps = 6000
    for name in ("test-clean", "test-other"):
        config.eval.sets[name.replace("-", "_")] = f"{folder}/{name}"
    config.lock()
    return config
