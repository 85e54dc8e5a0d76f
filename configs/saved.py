"""The config that a training saved in its newest checkpoint, to evaluate or to repeat it.

    python eval.py --config=configs/saved.py:WORKDIR --workdir=WORKDIR --sets=mine \\
        --config.eval.sets.mine=DIR/test.jsonl

Hardware, time and result: those of that training.
"""

from ml_collections import ConfigDict

from fastslm_jax.inference import load
from fastslm_jax.training.checkpoint import Checkpoints


def get_config(workdir: str) -> ConfigDict:
    """workdir: of the training."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = load.find_step(checkpoints, workdir)
    config = load.saved_config(checkpoints, workdir, step)
    checkpoints.close()
    return config.lock()
