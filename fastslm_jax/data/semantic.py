"""Ordering of transcripts by similarity, so that neighbors share a topic.

TF-IDF vectors are bisected recursively into small groups; inside a group, every transcript is
followed by the most similar one left. Every pass over the data draws new random directions, so that
clips get different neighbors. The order takes O(n log n) for n transcripts.
"""

import collections
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse

_GROUP_SIZE = 32  # transcripts that are compared pairwise
_WORD = re.compile(r"\w+")
_MAX_DOCUMENT_FREQUENCY = 0.25  # words in more than this share of the transcripts are ignored
_POWER_ITERATIONS = 3  # few, so that every pass finds a different direction


def tf_idf(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """TF-IDF rows of unit norm (zero for a text without informative words).

    Returns:
        [texts, words] float32.
    """
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
    most = max(2, _MAX_DOCUMENT_FREQUENCY * len(texts))
    is_informative = (frequency >= 2) & (frequency <= most)
    weights = np.where(is_informative, np.log((1 + len(texts)) / (1 + frequency)), 0.0)
    matrix = matrix @ scipy.sparse.diags_array(weights.astype(np.float32))
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)))
    scales = (1 / np.where(norms > 0, norms, 1)).astype(np.float32)
    matrix = (scipy.sparse.diags_array(scales) @ matrix).tocsr()
    matrix.eliminate_zeros()
    return matrix


def _order_along_direction(matrix: scipy.sparse.csr_array, rng: np.random.Generator) -> np.ndarray:
    """Row numbers [rows], sorted along a random direction of high variance (power iteration)."""
    direction = rng.standard_normal(matrix.shape[0])
    for _ in range(_POWER_ITERATIONS):
        word_direction = (direction - direction.mean()) @ matrix
        direction = matrix @ (word_direction / max(1e-12, np.linalg.norm(word_direction)))
    return np.argsort(direction, kind="stable")


def _nearest_neighbor_chain(matrix: scipy.sparse.csr_array, rng: np.random.Generator) -> list[int]:
    """Row numbers from a random start, each followed by the most similar row left."""
    similarity = (matrix @ matrix.T).toarray()
    at = int(rng.integers(len(similarity)))
    chain, is_left = [at], np.ones(len(similarity), bool)
    is_left[at] = False
    while is_left.any():
        at = int(np.where(is_left, similarity[at], -1.0).argmax())
        chain.append(at)
        is_left[at] = False
    return chain


def similarity_order(matrix: scipy.sparse.csr_array, rng: np.random.Generator) -> list[int]:
    """A permutation of the rows of `tf_idf` in which neighbors are similar."""
    result, stack = [], [rng.permutation(matrix.shape[0])]
    while stack:
        rows = stack.pop()
        part = matrix[rows]
        if len(rows) <= _GROUP_SIZE:
            result += rows[_nearest_neighbor_chain(part, rng)].tolist() if len(rows) else []
            continue
        rows = rows[_order_along_direction(part, rng)]
        stack += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]  # the first half is popped first
    return result
