"""Tables with another number of rows than in the files.

More rows of embeddings are for tokens that were added to a tokenizer; fewer of Whisper's positions
are for shorter windows.
"""

import functools
from collections.abc import Iterable

import numpy as np

from fastslm_jax.weights.tensors import TensorSource

_CHUNK = 4096  # rows that are averaged at a time


class ResizedTable:
    """A source whose tables [rows, d] are made longer or are cut.

    Each new row is the mean of the stored ones.

    Args:
        keys: the names of the tables; those that the source lacks are ignored.
        rows: rows of a table in the files. Other sizes are left as they are, so that reading finds
            them misshapen.
        added: new rows; negative to leave out the last ones.
    """

    def __init__(self, source: TensorSource, keys: Iterable[str], rows: int, added: int) -> None:
        self.path, self._source, self._rows, self._added = source.path, source, rows, added
        present = source.keys()
        self._tables = {key for key in keys if key in present and source.shape(key)[:1] == (rows,)}

    def keys(self) -> set[str]:
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        first, *others = self._source.shape(key) or (None,)
        if key in self._tables:
            return (first + self._added, *others)
        return self._source.shape(key)

    def dtype(self, key: str) -> str:
        return self._source.dtype(key)

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        if key not in self._tables:
            return self._source.read(key, index)
        rows, *columns = index or (slice(None),)
        first, last, _ = rows.indices(self._rows + self._added)
        stored = self._source.read(key, (slice(first, min(last, self._rows)), *columns))
        new = max(0, last - max(first, self._rows))
        if not new:
            return stored
        mean = self._mean(key)[tuple(columns)]
        return np.concatenate([stored, np.broadcast_to(mean, (new, *mean.shape))])

    @functools.cache  # noqa: B019 (lives as long as one load)
    def _mean(self, key: str) -> np.ndarray:
        total = 0.0
        for first in range(0, self._rows, _CHUNK):
            part = self._source.read(key, (slice(first, min(first + _CHUNK, self._rows)),))
            total = total + part.astype(np.float64).sum(axis=0)
        return (total / self._rows).astype(part.dtype)
