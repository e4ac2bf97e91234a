"""Products of rows with a decay per channel between them, in matrix products, whatever the decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def decayed_products(
    rows: Sequence[Tensor], columns: Sequence[Tensor], log_decay: Tensor
) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """For every x of `rows` and y of `columns`, with g the log decay (<= 0)::

        P[m, n] = sum_c x[m, c] y[n, c] exp(g[n+1, c] + ... + g[m, c])  for n <= m, else 0

    All (..., C, K) with C a power of two; P (..., C, C). Also the sums of g up to each row, with it, and after it.

    Pairs are met where halves are joined: the row in the later half carries the decay from the middle on, the one in
    the earlier half that up to the middle. Every exponent is a sum of numbers that are not positive, added up rather
    than subtracted: nothing overflows, and nothing cancels.
    """
    through = log_decay.unsqueeze(-2)  # (..., blocks, size, K)
    after = torch.zeros_like(through)
    products = [[(x * y).sum(-1)[..., None, None] for y in columns] for x in rows]
    size = 1
    while size < log_decay.shape[-2]:
        (through_early, through_late), (after_early, after_late) = _halves(through), _halves(after)
        to_middle, from_middle = after_early.exp(), through_late.exp()
        later = [x.unflatten(-2, (-1, 2, size))[..., 1, :, :] * from_middle for x in rows]
        earlier = [(y.unflatten(-2, (-1, 2, size))[..., 0, :, :] * to_middle).mT for y in columns]
        for x, line in zip(later, products, strict=True):
            for index, y in enumerate(earlier):
                first, second = _halves(line[index])
                line[index] = torch.cat([pad(first, (0, size)), torch.cat([x @ y, second], -1)], -2)
        middle, end = through_early[..., -1:, :], through_late[..., -1:, :]
        through = torch.cat([through_early, through_late + middle], -2)
        after = torch.cat([after_early + end, after_late], -2)
        size *= 2
    return [[x.squeeze(-3) for x in line] for line in products], through.squeeze(-3), after.squeeze(-3)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every other block: (..., 2 blocks, size, K) -> two of (..., blocks, size, K)."""
    pairs = x.unflatten(-3, (-1, 2))
    return pairs[..., 0, :, :], pairs[..., 1, :, :]
