"""The full-size model for the benchmarks that compile generation for absent devices."""

import math
import pathlib
import tempfile

import jax

from fastslm_jax import config as config_lib
from fastslm_jax import sharding
from fastslm_jax.models.fastslm import FastSLM
from fastslm_jax.plan import published_configs
from fastslm_jax.training import experiment


def full_size(device: jax.Device) -> FastSLM:
    """FastSLM-4B as the full-size configs build it for a device, in bfloat16."""
    config = config_lib.full_size()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("whisper", "llm"):
            config.base[name] = published_configs.local(config.base[name], pathlib.Path(folder))
        mesh = sharding.make_mesh(devices=[device])
        return experiment.build(config, weights=False, mesh=mesh).model


def bytes_of(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
