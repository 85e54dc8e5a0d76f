"""Packing of examples into rows: planned from metadata, assembled from samples.

A row has a fixed number of window slots and token slots:

    row     = [ example | example | … | padding ]
    tokens    prompt, speech tokens, rest of the prompt and answer of every example; attention never
              crosses examples (segment_ids)
    windows   the windows of all examples, concatenated; token `t` is speech token speech_slot[t]
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from fastslm_jax.audio import CONTEXT, WindowSpec
from fastslm_jax.data.prompts import Encoded
from fastslm_jax.errors import UserError


class PackingError(UserError):
    """An example does not fit in a row. The message gives its size and the row's."""


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Slots of a row.

    Attributes:
        windows: encoder windows.
        tokens: decoder tokens.
        labels: tokens that the loss covers. Their logits dominate the memory of the loss.
    """

    windows: int
    tokens: int
    labels: int


def pack(sizes: np.ndarray, shape: RowShape, open_rows: int = 64) -> list[list[int]]:
    """Best-fit packing in the given order: every example goes to the fullest open row it fits in.

    At most `open_rows` rows are open at a time, so an example stays close to its position in the
    given order.

    Example: sizes of 3, 2 and 1 windows in rows of 4 windows → [[0, 2], [1]].

    Args:
        sizes: [examples, 3] windows, tokens and labels of every example.
        shape: slots of a row.
        open_rows: rows that can still take examples.

    Returns:
        The example numbers of every row, in the order in which rows were opened.

    Raises:
        PackingError: an example is larger than a row.
    """
    capacity = (shape.windows, shape.tokens, shape.labels)
    too_large = np.flatnonzero((sizes > capacity).any(axis=1))
    if len(too_large):
        windows, tokens, labels = sizes[too_large[0]]
        raise PackingError(
            f"example {too_large[0]} takes {windows} windows, {tokens} tokens and {labels} labels; "
            f"a row has {shape.windows}, {shape.tokens} and {shape.labels}"
        )
    rows: list[list[int]] = []
    # Open rows as (free windows, free tokens, slot, free labels, row), sorted from the fullest to
    # the emptiest. The first that fits is the best fit; bisection skips those with too few free
    # windows. A slot without a row has nothing free.
    opened: list[tuple[int, int, int, int, list[int]]] = [
        (0, 0, slot, 0, []) for slot in range(open_rows)
    ]
    for number, (windows, tokens, labels) in enumerate(sizes.tolist()):
        at = bisect.bisect_left(opened, (windows, tokens))
        while at < open_rows and (opened[at][1] < tokens or opened[at][3] < labels):
            at += 1
        if at < open_rows:
            free_windows, free_tokens, slot, free_labels, row = opened.pop(at)
        else:  # close the row with the fewest free windows
            fewest = [entry for entry in opened if entry[0] == opened[0][0]]
            entry = min(fewest, key=lambda entry: entry[2])
            opened.remove(entry)
            slot, row = entry[2], []
            free_windows, free_tokens, free_labels = capacity
            rows.append(row)
        row.append(number)
        bisect.insort(
            opened, (free_windows - windows, free_tokens - tokens, slot, free_labels - labels, row)
        )
    return rows


def suggest(sizes: np.ndarray, windows: int, spare: float = 0.05) -> RowShape:
    """Suggests a row shape in which windows, the most expensive slots, run out first.

    Args:
        sizes: [examples, 3] windows, tokens and labels of every example.
        windows: window slots of a row.
        spare: fraction of token and label slots to add to the expected number.

    Returns:
        A shape in which every example fits; tokens and labels are multiples of 64.
    """
    full, largest = sizes.sum(axis=0) * windows / sizes[:, 0].sum(), sizes.max(axis=0)
    tokens, labels = (max(int(np.ceil(full[i] * (1 + spare))), int(largest[i])) for i in (1, 2))
    tokens = -(-tokens // 64) * 64
    # Labels vary more than tokens, most of which are speech, and cost only the memory of logits.
    labels = min(tokens, -(-int(1.2 * labels) // 64) * 64)
    return RowShape(max(windows, int(largest[0])), tokens, labels)


def assemble(
    parts: Sequence[tuple[Encoded, np.ndarray | None]],
    shape: RowShape,
    spec: WindowSpec,
    tokens_per_window: int,
) -> dict[str, np.ndarray]:
    """Builds the arrays of a row from its examples.

    Args:
        parts: ids and int16 samples of every example (None for an example without audio).
        shape: slots of the row.
        spec: how recordings are cut into windows.
        tokens_per_window: speech tokens per window.

    Returns:
        Per window:
            audio [windows, samples + 2·CONTEXT] int16.
            window_frames [windows] int32: valid frames (0: empty slot).
            window_recording [windows] int32: the example's number in the row (-1: empty slot).
        Per token, all [tokens]:
            tokens int32: input ids (0 at speech tokens and padding).
            labels int32: the next token.
            loss_mask float32: 1 where the label is part of the loss.
            segment_ids int32: the example's number in the row (0: padding).
            position_ids int32: position in the example.
            speech_slot int32: index of the speech token in the row (-1: text).
            lora_gate float32: 1 in examples with audio.
    """
    row = {
        "audio": np.zeros((shape.windows, spec.samples + 2 * CONTEXT), np.int16),
        "window_frames": np.zeros(shape.windows, np.int32),
        "window_recording": np.full(shape.windows, -1, np.int32),
        "speech_slot": np.full(shape.tokens, -1, np.int32),
        "loss_mask": np.zeros(shape.tokens, np.float32),
        "lora_gate": np.zeros(shape.tokens, np.float32),
    }
    row |= {
        name: np.zeros(shape.tokens, np.int32)
        for name in ("tokens", "labels", "segment_ids", "position_ids")
    }
    window, at = 0, 0
    for segment, (encoded, samples) in enumerate(parts, start=1):
        length = len(encoded.tokens)
        part = slice(at, at + length)
        row["tokens"][part] = encoded.tokens
        row["labels"][at : at + length - 1] = encoded.tokens[1:]
        row["loss_mask"][at : at + length - 1] = encoded.loss_mask[1:]
        row["segment_ids"][part] = segment
        row["position_ids"][part] = np.arange(length)
        if encoded.num_speech:
            windows, frames = spec.cut(samples)
            slots = slice(window, window + len(windows))
            row["audio"][slots] = windows
            row["window_frames"][slots] = frames
            row["window_recording"][slots] = segment
            start = at + encoded.speech_start
            row["speech_slot"][start : start + encoded.num_speech] = (
                window * tokens_per_window + np.arange(encoded.num_speech)
            )
            row["lora_gate"][part] = 1.0
            window += len(windows)
        at += length
    return row
