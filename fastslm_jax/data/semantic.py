"""An order in which neighbouring transcripts are about the same: TF-IDF, halved again and again, then walked from like to like.

Every pass draws its own directions, so that the same clips meet other neighbours of their topic. It takes O(n log n) for n
transcripts: far ones are never compared.
"""

import collections
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse

LEAF = 32  # transcripts among which the nearest is looked for
_WORD = re.compile(r"\w+")
_MAX_SHARE = 0.25  # words in more than a quarter of the transcripts tell nothing


def vectors(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """TF-IDF rows of unit length (zero where a text has no telling word): [texts, words] float32."""
    words: dict[str, int] = {}
    columns, counts, ends = [], [], [0]
    for text in texts:
        for word, count in collections.Counter(_WORD.findall(text.lower())).items():
            columns.append(words.setdefault(word, len(words)))
            counts.append(count)
        ends.append(len(columns))
    shape = (len(texts), max(1, len(words)))
    matrix = scipy.sparse.csr_array(
        (np.array(counts, np.float32), np.array(columns, np.int64), np.array(ends)), shape
    )
    frequency = np.bincount(matrix.indices, minlength=shape[1])
    tells = (frequency >= 2) & (frequency <= max(2, _MAX_SHARE * len(texts)))
    weights = np.where(tells, np.log((1 + len(texts)) / (1 + frequency)), 0.0).astype(np.float32)
    matrix = matrix @ scipy.sparse.diags_array(weights)
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)))
    matrix = (
        scipy.sparse.diags_array((1 / np.where(norms > 0, norms, 1)).astype(np.float32)) @ matrix
    ).tocsr()
    matrix.eliminate_zeros()
    return matrix


def _halves(matrix: scipy.sparse.csr_array, rng: np.random.Generator) -> np.ndarray:
    """Order of the rows along a direction in which they differ much: [rows]."""
    direction = rng.standard_normal(matrix.shape[0])
    for _ in range(3):  # of the power method: few, so that every pass finds another direction
        word_direction = (direction - direction.mean()) @ matrix
        direction = matrix @ (word_direction / max(1e-12, np.linalg.norm(word_direction)))
    return np.argsort(direction, kind="stable")


def _walk(matrix: scipy.sparse.csr_array, rng: np.random.Generator) -> list[int]:
    """From a drawn row on, always to the most similar one that is left."""
    similarity = (matrix @ matrix.T).toarray()
    at = int(rng.integers(len(similarity)))
    order, left = [at], np.ones(len(similarity), bool)
    left[at] = False
    while left.any():
        at = int(np.where(left, similarity[at], -1.0).argmax())
        order.append(at)
        left[at] = False
    return order


def order(matrix: scipy.sparse.csr_array, rng: np.random.Generator) -> list[int]:
    """A permutation of the rows of `vectors` in which neighbours are alike. A function of both arguments alone."""
    result, stack = [], [rng.permutation(matrix.shape[0])]
    while stack:
        rows = stack.pop()
        part = matrix[rows]
        if len(rows) <= LEAF:
            result += rows[_walk(part, rng)].tolist() if len(rows) else []
            continue
        rows = rows[_halves(part, rng)]
        stack += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]  # the first half is popped first
    return result
