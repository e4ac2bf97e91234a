"""Parity: is the number of ones even or odd?"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from tidegate.tasks.targets import IGNORE, check_range, check_sizes

PAD = 0


def parity(batch: int, generator: Generator, *, length: int = 32) -> tuple[Tensor, Tensor]:
    """Random bits; the target of every position is the parity of the ones up to and with it.

    Returns ids and targets, both (batch, length) of 0 and 1.

    >>> ids, targets = parity(1, torch.Generator().manual_seed(0), length=6)
    >>> ids.tolist(), targets.tolist()
    ([[0, 1, 1, 0, 1, 1]], [[0, 1, 0, 0, 1, 0]])
    """
    check_sizes(batch=batch, length=length)
    ids = torch.randint(2, (batch, length), generator=generator)
    return ids, ids.cumsum(1) % 2


def parity_answer(batch: int, generator: Generator, *, lengths: tuple[int, int] = (3, 40)) -> tuple[Tensor, Tensor]:
    """Parity with one answer, behind the string, of a length drawn evenly from `lengths` (both ends included).

    Returns ids and targets, both (batch, longest length + 1). Tokens: PAD 0, the bits 1 and 2. The answer's position
    is the first PAD; its target is 1 for an even number of twos and 2 for an odd one, all other targets are IGNORE.

    >>> ids, targets = parity_answer(2, torch.Generator().manual_seed(0), lengths=(2, 4))
    >>> ids.tolist(), targets.tolist()
    ([[2, 1, 2, 2, 0], [2, 2, 0, 0, 0]], [[-100, -100, -100, -100, 2], [-100, -100, 1, -100, -100]])
    """
    check_sizes(batch=batch)
    check_range("lengths", lengths)
    length = torch.randint(lengths[0], lengths[1] + 1, (batch, 1), generator=generator)
    time = torch.arange(lengths[1] + 1)
    bits = torch.randint(2, (batch, lengths[1] + 1), generator=generator).where(time < length, 0)
    ids = torch.where(time < length, 1 + bits, PAD)
    return ids, torch.where(time == length, 1 + bits.sum(1, keepdim=True) % 2, IGNORE)
