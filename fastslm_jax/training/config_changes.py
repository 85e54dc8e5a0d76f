"""What has changed between a checkpoint's config and data, and those of the run that resumes."""

import json
from collections.abc import Mapping

from absl import logging
from ml_collections import ConfigDict

from fastslm_jax import config as config_lib

# Fields and groups of a config that may change on resume without a warning: none affects training.
FREE_FIELDS = (
    "name",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped",
    "wandb",
    "profile",
)
FREE_GROUPS = ("mesh.", "eval.")


def warn_of_changes(meta: Mapping, config: ConfigDict, data: Mapping[str, str]) -> None:
    """Warns about what has changed between a checkpoint and the run that resumes from it.

    Args:
        meta: of the checkpoint.
        config: of the run.
        data: {source: fingerprint of its manifest} of the run.
    """
    for change in differences(meta["config"], config):
        logging.warning("%s", change)
    for name, fingerprint in data.items():
        if meta.get("data", {}).get(name, fingerprint) != fingerprint:
            logging.warning(
                "config.data.train.%s: the manifest has changed since the checkpoint was saved, "
                "so the rows from here on differ",
                name,
            )


def differences(before: Mapping, config: ConfigDict) -> list[str]:
    """The fields that affect training and differ from those in a checkpoint.

    A field that the checkpoint is too old to have was off: empty, 0, or the schema's default.

    Example: ["config.seed was 1 before the resume and is now 2"].
    """
    older = flatten(config_lib.older_checkpoint_fields())
    now = json.loads(config.to_json_best_effort())
    was, now = (older | flatten(fields) for fields in (before, now))
    return [
        f"config.{field} was {was.get(field)!r} before the resume and is now {now.get(field)!r}"
        for field in sorted(set(was) | set(now))
        if not (field in FREE_FIELDS or field.startswith(FREE_GROUPS))
        and (was.get(field) or None) != (now.get(field) or None)
    ]


def flatten(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """Example: {"a": {"b": 1}} → {"a.b": 1}."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
