"""Adapters: encoder features of a window → speech tokens; see `base.Adapter`.

config.model.adapter chooses one by its name in ADAPTERS.
"""

from fastslm_jax.models.adapters.base import Adapter
from fastslm_jax.models.adapters.hfq import HFQFormer
from fastslm_jax.models.adapters.pooling import Pooling
from fastslm_jax.models.adapters.sq_former import SQFormer
from fastslm_jax.models.adapters.stack import Stack
from fastslm_jax.models.adapters.wq_former import WQFormer

ADAPTERS: dict[str, type[Adapter]] = {
    "hfq": HFQFormer,
    "pooling": Pooling,
    "stack": Stack,
    "wq_former": WQFormer,
    "sq_former": SQFormer,
}
