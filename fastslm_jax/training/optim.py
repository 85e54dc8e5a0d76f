"""Which parameters are trained, and the optimizer: one regex table and one optax chain."""

import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fastslm_jax.errors import UserError

OPTIMIZERS = ("adamw", "muon")
_ATTENTION = ("query", "key", "value", "out")
# Parts that a config can leave out: a fragment of their paths, and paths.
_OPTIONAL = {
    "/lora_": [
        f"llm/layers/{name}/lora_{factor}"
        for name in ("query", "key", "value", "out", "gate", "up", "down")
        for factor in "ab"
    ],
    "/detail_recovery_": [
        f"hfq_former/detail_recovery_0/{kind}_attention/{name}/kernel"
        for kind in ("self", "cross")
        for name in _ATTENTION
    ],
    "adapter/layer_0/self_attention/": [
        f"adapter/layer_0/self_attention/{name}/kernel" for name in _ATTENTION
    ],
}


class TrainableError(UserError):
    """config.trainable or config.optimizer.learning_rate_ratios does not fit the model."""


def trainable_mask(paths: Sequence[str], table: Sequence[tuple[str, bool]]) -> dict[str, bool]:
    """{path: whether it is trained}. The first pattern that matches a whole path decides.

    Raises:
        TrainableError: a path matches no pattern, a pattern decides nothing, or nothing is trained.
    """
    used, mask = set(), {}
    for path in paths:
        hit = next((pattern for pattern, _ in table if re.fullmatch(pattern, path)), None)
        if hit is None:
            raise TrainableError(
                f"parameter {path} matches no pattern of config.trainable; add one, for example "
                f"('{path}', False)"
            )
        used.add(hit)
        mask[path] = bool(dict(table)[hit])
    if unused := _unused(table, used, paths):
        raise TrainableError(
            f"pattern {unused[0]!r} of config.trainable decides no parameter; remove or correct it"
        )
    if not any(mask.values()):
        raise TrainableError("config.trainable trains nothing")
    return mask


def _unused(table: Sequence[tuple], used: set[str], paths: Iterable[str]) -> list[str]:
    """The patterns that decide nothing, but for those of optional parts that are left out."""
    absent = [
        path
        for fragment, examples in _OPTIONAL.items()
        if not any(fragment in path for path in paths)
        for path in examples
    ]
    return [
        pattern
        for pattern, _ in table
        if pattern not in used and not any(re.fullmatch(pattern, path) for path in absent)
    ]


def split(params: Mapping, mask: Mapping[str, bool]) -> tuple[dict, dict]:
    """A nested or flat dict of parameters → (trained, frozen), flat dicts {path: leaf}."""
    leaves = flatten_dict(params, sep="/")
    trained = {path: leaf for path, leaf in leaves.items() if mask[path]}
    frozen = {path: leaf for path, leaf in leaves.items() if not mask[path]}
    return trained, frozen


def merge(trained: Mapping, frozen: Mapping) -> dict:
    """(trained, frozen) of `split` → one nested dict."""
    return unflatten_dict({**frozen, **trained}, sep="/")


def schedule(
    name: str, peak: float, steps: int, warmup_steps: int, final_fraction: float = 0.0
) -> optax.Schedule:
    """Learning rate by step: linear warmup to `peak`, then decay to final_fraction · peak.

    Args:
        name: shape of the decay: "cosine", "linear" or "constant".
        steps: the step at which the decay ends.
    """
    decay_steps = max(1, steps - warmup_steps)
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=final_fraction),
        "linear": optax.linear_schedule(peak, peak * final_fraction, decay_steps),
        "constant": optax.constant_schedule(peak),
    }
    if name not in decays:
        raise UserError(f"config.optimizer.schedule={name!r} is not one of {', '.join(decays)}")
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, max(1, warmup_steps)), decays[name]], [warmup_steps]
    )


def _muon_axes(path: str, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """Input and output axes of a weight matrix.

    None leaves the parameter to Adam: vectors, embeddings and position tables.
    """
    name = path.rsplit("/", 1)[-1]
    if name not in ("kernel", "lora_a", "lora_b") or leaf.ndim < 2:
        return None
    if re.search(r"conv\d?/kernel", path):
        return optax.contrib.MuonDimensionNumbers((leaf.ndim - 3, leaf.ndim - 2), leaf.ndim - 1)
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule,
    *,
    adam_learning_rate_ratio: float = 1.0,
    learning_rate_ratios: Sequence[tuple[str, float]] = (),
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW or Muon on flat dicts {path: leaf}, after clipping the global norm of the gradients.

    Muon updates the weight matrices; all other parameters get Adam, with a learning rate of
    adam_learning_rate_ratio · learning_rate. Weight decay applies to parameters with two or more
    axes.

    Args:
        name: "adamw" or "muon".
        learning_rate_ratios: (pattern, ratio): scales the updates of the paths that match; the
            first match decides. LoRA needs a small ratio with Muon, because the product of its
            factors, times alpha / rank, makes large steps.
        clip_norm: 0 for no clipping.

    Raises:
        TrainableError: a pattern decides nothing. Raised when the step is traced.
    """

    def decayed(leaves: optax.Params) -> optax.Params:
        # A tree map, because optax replaces masked leaves.
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, leaves)

    if name == "adamw":
        rule = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    elif name == "muon":
        rule = optax.contrib.muon(
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=lambda step: adam_learning_rate_ratio * learning_rate(step),
            muon_weight_dimension_numbers=lambda leaves: {
                path: _muon_axes(path, leaf) for path, leaf in leaves.items()
            },
        )
    else:
        raise UserError(f"config.optimizer.name={name!r} is not one of {', '.join(OPTIMIZERS)}")
    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    chain.append(rule)
    if learning_rate_ratios:
        chain.append(
            optax.stateless(lambda updates, _: _scale_by_path(updates, learning_rate_ratios))
        )
    return optax.chain(*chain)


def _scale_by_path(
    updates: Mapping[str, jax.Array], table: Sequence[tuple[str, float]]
) -> dict[str, jax.Array]:
    deciding = {
        path: next((row for row in table if re.fullmatch(row[0], path)), None) for path in updates
    }
    used = {row[0] for row in deciding.values() if row}
    if unused := _unused(table, used, updates):
        raise TrainableError(
            f"pattern {unused[0]!r} of config.optimizer.learning_rate_ratios decides no trained "
            "parameter; remove or correct it"
        )
    return {
        path: leaf if deciding[path] is None else deciding[path][1] * leaf
        for path, leaf in updates.items()
    }


def count(leaves: Mapping[str, jax.Array]) -> int:
    """Number of parameters in a flat dict."""
    return sum(leaf.size for leaf in leaves.values())
