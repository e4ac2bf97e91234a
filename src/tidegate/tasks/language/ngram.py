"""The yardstick: a byte n-gram model with interpolated Kneser-Ney smoothing, in vectorised numpy.

The probability of a byte s after a context c of k bytes, c' being c without its oldest byte::

    P_k(s | c) = max(n(c s) - D_k, 0) / n(c) + D_k * distinct(c) / n(c) * P_{k-1}(s | c')

n counts occurrences at the highest order and distinct left neighbours below it; D_k = n1 / (n1 + 2 n2), the numbers
of entries counted once and twice; P_{-1} is uniform. Kneser and Ney 1995; Chen and Goodman 1999.
The context never reaches back across a document's beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SYMBOLS = 256  # bytes; 255 never occurs in UTF-8 and stands for the boundary between documents
BOUNDARY = 255
_CHUNK = 8 << 20


@dataclass(frozen=True)
class _Level:
    """One order: sorted entries `context * 256 + symbol` with counts, and the contexts' totals."""

    entries: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray
    discount: float


class NGram:
    """A byte model with `order` bytes of context.

    >>> stream = np.frombuffer(b"\\xffabababab\\xff", np.uint8)
    >>> model = NGram.fit(stream, order=3)
    >>> model.bits_per_byte(stream) < 1.0
    True
    """

    def __init__(self, levels: list[_Level]) -> None:
        self._levels = levels  # index = bytes of context

    @property
    def order(self) -> int:
        """Bytes of context."""
        return len(self._levels) - 1

    @staticmethod
    def fit(stream: np.ndarray, order: int = 3, limit: int | None = None) -> NGram:
        """Count a byte stream (documents with a 255 before, between and after them), its first `limit` bytes if given.

        Raises ValueError for an order outside 0 ... 6 or a stream without text.
        """
        if not 0 <= order <= 6:  # eight symbols of eight bits would not fit a signed 64-bit key
            raise ValueError(f"order: seen {order}, wanted 0 to 6 bytes of context")
        stream = stream[:limit]
        if len(stream) < 2:
            raise ValueError("stream: there is no text in it; give at least one byte between boundaries")
        keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for chunk in _keys(stream, order):
            new, new_counts = np.unique(chunk, return_counts=True)
            keys, counts = _merge(np.concatenate([keys, new]), np.concatenate([counts, new_counts]))
        levels = []
        for k in range(order, -1, -1):
            levels.append(_level(keys, counts))
            if k:  # of each shorter entry, the number of different bytes seen to its left
                keys, counts = np.unique(keys % SYMBOLS**k, return_counts=True)
        return NGram(levels[::-1])

    def probability(self, keys: np.ndarray) -> np.ndarray:
        """Of each entry `context * 256 + symbol`, the probability of the symbol after the context."""
        p = np.full(len(keys), 1 / SYMBOLS)
        for k, level in enumerate(self._levels):
            entry = keys % SYMBOLS ** (k + 1)
            count, seen = _find(level.entries, entry, level.counts)
            count = np.where(seen, count, 0)
            total, known = _find(level.contexts, entry // SYMBOLS, level.totals)
            distinct, _ = _find(level.contexts, entry // SYMBOLS, level.distinct)
            total = np.where(known, total, 1)
            higher = np.maximum(count - level.discount, 0) / total + level.discount * distinct / total * p
            p = np.where(known, higher, p)
        return p

    def bits_per_byte(self, stream: np.ndarray) -> float:
        """Code length of a byte stream, the documents' ends included, in bits per byte of text."""
        bits, size = 0.0, 0
        for keys in _keys(stream, self.order):
            bits -= float(np.log2(self.probability(keys)).sum())
            size += int((keys % SYMBOLS != BOUNDARY).sum())
        return bits / size if size else math.nan


def _keys(stream: np.ndarray, order: int) -> Iterator[np.ndarray]:
    """For every byte after the first, its context and itself as one number, some millions at a time."""
    for begin in range(1, len(stream), _CHUNK):
        end = min(begin + _CHUNK, len(stream))
        first = max(begin - order, 0)
        window = np.asarray(stream[first:end]).astype(np.int64)
        padded = np.concatenate([np.full(order - (begin - first), BOUNDARY, np.int64), window])
        size = end - begin
        keys = padded[order:].copy()
        nearer = np.zeros(size, bool)
        for back in range(1, order + 1):
            symbol = padded[order - back : order - back + size]
            symbol = np.where(nearer, BOUNDARY, symbol)  # beyond the document's beginning there is only boundary
            keys += symbol * SYMBOLS**back
            nearer = symbol == BOUNDARY
        yield keys


def _level(entries: np.ndarray, counts: np.ndarray) -> _Level:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    contexts, first = np.unique(entries // SYMBOLS, return_index=True)
    distinct = np.diff(np.append(first, len(entries)))
    return _Level(entries, counts, contexts, np.add.reduceat(counts, first), distinct, discount)


def _merge(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    merged, index = np.unique(keys, return_inverse=True)
    return merged, np.bincount(index, weights=counts, minlength=len(merged)).astype(np.int64)


def _find(table: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`values` at the places of `wanted` in a sorted `table`, and whether it was there."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return values[place], table[place] == wanted
