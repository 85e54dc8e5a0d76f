"""Predictions of speech recognition, as eval.py writes them, or a part of them."""

import pathlib

from absl import flags

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation.results import read_predictions

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("references", None, "Text file: only utterances with one of its lines.")


def read(path: str | pathlib.Path) -> list[dict]:
    """The predictions of a file whose reference is a line of --references, or all.

    Raises:
        UserError: none are left, or they are of another task or of several languages.
    """
    found = read_predictions(pathlib.Path(path))
    if FLAGS.references:
        text = pathlib.Path(FLAGS.references).read_text(encoding="utf-8")
        lines = {line.strip() for line in text.splitlines()}
        found = [p for p in found if p["reference"].strip() in lines]
    if not found:
        raise UserError(f"{path}: none of its utterances is a line of {FLAGS.references}")
    kinds = sorted({(p["task"], p["lang"]) for p in found})
    if len(kinds) > 1 or kinds[0][0] != "asr":
        raise UserError(f"{path}: needs speech recognition in one language, and has {kinds}")
    return found
