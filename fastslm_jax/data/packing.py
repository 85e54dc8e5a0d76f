"""Packing: examples into rows of fixed window slots and token slots, planned from metadata, assembled from samples.

row     = [ example | example | … | padding ]
tokens    prompt, speech tokens, prompt, answer of each example; attention never crosses examples (segment_ids)
windows   the examples' windows one after another; token `t` of a row is speech token speech_slot[t] of the row
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from fastslm_jax.audio import CONTEXT, WindowSpec
from fastslm_jax.data.prompts import Encoded
from fastslm_jax.errors import UserError


class PackingError(UserError):
    """An example that fits no row: says what it needs and what a row has."""


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Slots of a row. label_slots bounds the tokens of a row that are predicted (their logits are what costs memory)."""

    windows: int
    tokens: int
    labels: int


@dataclasses.dataclass(frozen=True)
class Size:
    """What an example takes of a row."""

    windows: int
    tokens: int
    labels: int

    def fits(self, shape: RowShape) -> bool:
        return (
            self.windows <= shape.windows
            and self.tokens <= shape.tokens
            and self.labels <= shape.labels
        )


def pack(
    sizes: Sequence[Size] | np.ndarray, shape: RowShape, open_rows: int = 64
) -> list[list[int]]:
    """Best-fit packing in the given order: each example goes to the fullest open row that takes it. Rows are listed as they were
    opened; an example keeps to the neighbourhood in which it was drawn, since at most `open_rows` stay open.

    Example: sizes of 3, 2 and 1 windows in rows of 4 windows → [[0, 2], [1]].

    Args:
        sizes: of the examples, or an array [examples, 3] of their windows, tokens and labels.

    Raises:
        PackingError: an example larger than a row.
    """
    if not isinstance(sizes, np.ndarray):
        sizes = np.array(
            [(size.windows, size.tokens, size.labels) for size in sizes], np.int64
        ).reshape(-1, 3)
    total = (shape.windows, shape.tokens, shape.labels)
    too_large = np.flatnonzero((sizes > total).any(axis=1))
    if len(too_large):
        windows, tokens, labels = sizes[too_large[0]]
        raise PackingError(
            f"example {too_large[0]} takes {windows} windows, {tokens} tokens and {labels} labels; "
            f"a row has {shape.windows}, {shape.tokens} and {shape.labels}"
        )
    rows: list[list[int]] = []
    # Open rows as (free windows, free tokens, place, free labels, row), the fullest first: the first that takes an example is the
    # one to choose, and those without enough windows are skipped by bisection. A place without a row has nothing free.
    opened: list[tuple[int, int, int, int, list[int]]] = [
        (0, 0, place, 0, []) for place in range(open_rows)
    ]
    for number, (windows, tokens, labels) in enumerate(sizes.tolist()):
        at = bisect.bisect_left(opened, (windows, tokens))
        while at < open_rows and (opened[at][1] < tokens or opened[at][3] < labels):
            at += 1
        if at < open_rows:
            free_windows, free_tokens, place, free_labels, row = opened.pop(at)
        else:  # the row with the fewest free windows gives up its place
            fewest = [entry for entry in opened if entry[0] == opened[0][0]]
            entry = min(fewest, key=lambda entry: entry[2])
            opened.remove(entry)
            place, row = entry[2], []
            free_windows, free_tokens, free_labels = total
            rows.append(row)
        row.append(number)
        bisect.insort(
            opened, (free_windows - windows, free_tokens - tokens, place, free_labels - labels, row)
        )
    return rows


def suggest(sizes: np.ndarray, windows: int, spare: float = 0.05) -> RowShape:
    """Slots of rows of so many windows for examples with these sizes [examples, 3]: tokens and labels of a row that is full of
    them, and `spare` more, so that windows are what runs out; at least the largest example's. Tokens are a multiple of 64.
    """
    full, largest = sizes.sum(axis=0) * windows / sizes[:, 0].sum(), sizes.max(axis=0)
    tokens, labels = (max(int(np.ceil(full[i] * (1 + spare))), int(largest[i])) for i in (1, 2))
    tokens = -(-tokens // 64) * 64
    # Labels vary more than tokens, of which most are speech; slots for them are only worth the logits' memory.
    return RowShape(
        max(windows, int(largest[0])), tokens, min(tokens, -(-int(1.2 * labels) // 64) * 64)
    )


def assemble(
    parts: Sequence[tuple[Encoded, np.ndarray]],
    shape: RowShape,
    spec: WindowSpec,
    tokens_per_window: int,
) -> dict[str, np.ndarray]:
    """Builds a row from its examples' ids and int16 samples (no samples for an example without audio).

    Returns:
        audio [windows, samples + 2·CONTEXT] int16, window_frames [windows], window_recording [windows] (−1: empty slot), and by
        token [tokens]: tokens, labels (the next token), loss_mask (1 where that label counts), segment_ids (0: padding),
        position_ids, speech_slot (−1: text), lora_gate (1 within examples that have audio).
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
            row["audio"][slots], row["window_frames"][slots], row["window_recording"][slots] = (
                windows,
                frames,
                segment,
            )
            start = at + encoded.speech_start
            row["speech_slot"][start : start + encoded.num_speech] = (
                window * tokens_per_window + np.arange(encoded.num_speech)
            )
            row["lora_gate"][part] = 1.0
            window += len(windows)
        at += length
    return row
