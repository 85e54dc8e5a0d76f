"""Short trainings for the experiments of docs/experiments.md, on the demo's corpus and models.

    python -m fastslm_jax.ablate --suite=adapters

Stage 1 is the demo's. Stage 2 joins sentences to 12 to 180 s (the demo: to 48 s),
from recordings of 200 s by one voice in one room, so that all groupings have the same clips.

Hardware: two CPU cores and 4 GiB. Time: about 5 minutes a stage.
Result: docs/experiments.md.
"""

from ml_collections import ConfigDict

from configs import demo
from fastslm_jax import config as config_lib


def get_config(arg: str = "1") -> ConfigDict:
    """arg: STAGE or STAGE,FOLDER. FOLDER (default runs/demo) has corpus/ and recordings/."""
    stage, _, folder = arg.partition(",")
    folder = folder or "runs/demo"
    if stage not in ("1", "2"):
        raise ValueError(f"configs/ablation.py has stages 1 and 2, not {stage!r}")
    config = demo.get_config(f"{stage},{folder}").unlock()
    config.name = f"ablation-stage{stage}"
    config.data.dev = ""  # the test sets are scored instead, once
    config.keep_checkpoints = 1
    config.eval.sets.recordings = f"{folder}/recordings/test.jsonl"
    if stage == "2":
        join = {"min_seconds": 12.0, "max_seconds": 180.0, "distribution": "log_uniform"}
        config.data.train.long = config_lib.source(
            f"{folder}/recordings/train.jsonl", ("asr",), join=join | {"grouping": "random"}
        )
        config.data.row.update({"windows": 32, "tokens": 1536, "labels": 896})
        config.steps, config.checkpoint_every = 200, 50
    config.lock()
    return config
