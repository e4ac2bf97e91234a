"""The recurrence of blocks in log2(T) sweeps over all tokens (Hillis and Steele 1986)."""

from __future__ import annotations

import torch
from torch import Tensor


def block_scan(A: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """As `tidegate.ops.block_scan`."""
    if reverse:
        return block_scan(A.flip(1), b.flip(1), False).flip(1)
    x, reach = b, 1
    while reach < x.shape[1]:  # every token has what the `reach` tokens up to it do to it, and what takes it there
        earlier = (A[:, reach:] * x[:, :-reach, None]).sum(3)
        both = torch.einsum("btijd,btjkd->btikd", A[:, reach:], A[:, :-reach])
        x = torch.cat([x[:, :reach], x[:, reach:] + earlier], 1)
        A = torch.cat([A[:, :reach], both], 1)
        reach *= 2
    return x
