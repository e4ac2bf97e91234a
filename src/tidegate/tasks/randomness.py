"""Random numbers for generators: choices without repetition for a whole batch, and streams for one example."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def distinct(batch: int, among: int, count: int, generator: Generator, weights: Tensor | None = None) -> Tensor:
    """(batch, count) different numbers below `among` in every row, in random order.

    With `weights` (among,), a number is drawn in proportion to its weight among those left: the order of exponential
    waiting times with these rates.

    >>> distinct(1, 5, 5, torch.Generator().manual_seed(0)).sort().values.tolist()
    [[0, 1, 2, 3, 4]]
    """
    waiting = torch.empty(batch, among, dtype=torch.float64).exponential_(generator=generator)
    return (waiting if weights is None else waiting / weights).argsort(1)[:, :count]


def seeds(batch: int, generator: Generator) -> list[int]:
    """A seed per example, so that an example that is built alone does not depend on the batch's size."""
    drawn: list[int] = torch.randint(2**62, (batch,), generator=generator).tolist()
    return drawn
