"""The config.json of pretrained models, changed for shorter windows and for added tokens."""

import pathlib

from absl import logging

from fastslm_jax.data import prompts
from fastslm_jax.errors import UserError

POSITIONS_PER_SECOND = 50  # of Whisper's encoder
POSITIONS_PER_TOKEN = 30  # of a speech token: 1.67 tokens a second
ROW_MULTIPLE = 64  # rows of an embedding table that is made longer


def with_window(whisper_config: dict, seconds: float, origin: str) -> tuple[dict, int]:
    """The config of an encoder for windows of `seconds`, which has the first of its positions.

    Args:
        whisper_config: its config.json.
        seconds: config.model.window_seconds; 0 for the encoder's own.
        origin: where the config comes from, for error messages.

    Returns:
        The config, and the number of positions that are left out.

    Raises:
        UserError: no such window is possible.
    """
    stored = whisper_config.get("max_source_positions")
    if not seconds or not isinstance(stored, int):
        return whisper_config, 0
    positions = round(POSITIONS_PER_SECOND * seconds)
    if not 1 <= positions <= stored or abs(positions - POSITIONS_PER_SECOND * seconds) > 1e-6:
        raise UserError(
            f"config.model.window_seconds={seconds:g}: should be a multiple of "
            f"{1 / POSITIONS_PER_SECOND:g} s and at most {stored / POSITIONS_PER_SECOND:g} s, the "
            f"window of {origin}"
        )
    return whisper_config | {"max_source_positions": positions}, stored - positions


def with_added_rows(llm_config: dict, folder: pathlib.Path, chat_template: str) -> tuple[dict, int]:
    """The config of a language model whose embedding table has a row for every added token.

    Missing rows are appended in multiples of 64, so that the table can be sharded.

    Args:
        llm_config: its config.json.
        folder: of its tokenizer; without one, nothing is appended.
        chat_template: config.model.chat_template.

    Returns:
        The config, and the number of appended rows.
    """
    rows = llm_config.get("vocab_size")
    if not prompts.has_tokenizer(folder) or not isinstance(rows, int):
        return llm_config, 0
    needed = prompts.num_ids(prompts.load_tokenizer(folder, chat_template=chat_template))
    if needed <= rows:
        return llm_config, 0
    total = -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    logging.info(
        "%s: the added tokens need %d embedding rows and the model has %d: %d rows are appended, "
        "each the mean of the others",
        folder,
        needed,
        rows,
        total - rows,
    )
    return llm_config | {"vocab_size": total}, total - rows


def speech_tokens(positions: int) -> int:
    """The speech tokens of a window of so many positions, at 1.67 a second; at least one."""
    return max(1, round(positions / POSITIONS_PER_TOKEN))
