"""FastSLM-4B with random weights: its base folders on disk, and peak memory while it is used."""

import json
import pathlib
import shutil
import threading

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from fastslm_jax import config as config_lib
from fastslm_jax.errors import UserError
from fastslm_jax.plan.published_configs import CONFIGS
from fastslm_jax.training import experiment
from fastslm_jax.weights import engine, layouts
from fastslm_jax.weights.tensors import Tensor, write_sharded

TOKENIZER = pathlib.Path(__file__).parents[1] / "assets/demo_llm"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WHISPER = CONFIGS["openai/whisper-large-v3"]
QWEN3 = CONFIGS["Qwen/Qwen3-4B-Instruct-2507"]
SMALL_WHISPER = WHISPER | {"encoder_layers": 2}
SMALL_QWEN3 = QWEN3 | {"num_hidden_layers": 2, "vocab_size": 4096}


def write_bases(scratch: pathlib.Path, small: bool = False) -> ConfigDict:
    """Writes random bfloat16 weights to scratch/whisper and scratch/llm, in shards of up to 4 GiB.

    The tokenizer is the demo's; its ids are valid in the larger vocabulary.

    Args:
        small: two layers of each base and a small vocabulary.

    Returns:
        the full-size config with these folders.
    """
    config = config_lib.full_size()
    config.base.whisper, config.base.llm = str(scratch / "whisper"), str(scratch / "llm")
    bases = {
        "whisper": SMALL_WHISPER if small else WHISPER,
        "llm": SMALL_QWEN3 if small else QWEN3,
    }
    for name, base in bases.items():
        (scratch / name).mkdir()
        (scratch / name / "config.json").write_text(json.dumps(base), encoding="utf-8")
    model = experiment.build(config, weights=False).model
    params = experiment.abstract_params(model, config.model.base_dtype)
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)
    for name, prefix, layout in (
        ("whisper", "encoder/", layouts.hf_whisper()),
        ("llm", "llm/", layouts.hf_decoder()),
    ):
        leaves = {
            path.removeprefix(prefix): leaf
            for path, leaf in params.items()
            if path.startswith(prefix) and experiment.is_base(path)
        }
        write_sharded(
            scratch / name,
            [
                Tensor(
                    tensor.key,
                    tensor.shape,
                    block.dtype,
                    lambda shape=tensor.shape: np.resize(block, shape),
                )
                for tensor in engine.tensors(leaves, layout)
            ],
        )
    for file in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / file, scratch / "llm")
    return config


class PrivateMemory:
    """Peak anonymous memory of a process while the block runs, in bytes.

    Page cache of memory-mapped files is not counted.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self.status = pathlib.Path(f"/proc/{pid}/status")
        if not pathlib.Path("/proc/self/status").exists():
            raise UserError("this benchmark reads memory use from /proc: run it on Linux")

    def __enter__(self) -> "PrivateMemory":
        self.before = self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self.now())

    def now(self) -> int:
        """Anonymous memory in bytes; 0 once the process has ended."""
        try:
            lines = self.status.read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0
        return next((1024 * int(x.split()[1]) for x in lines if x.startswith("RssAnon")), 0)
