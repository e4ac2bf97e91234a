"""The linear recurrence of small blocks, x_t = A_t x_{t-1} + b_t: what each Newton iteration solves for a cell."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.scan import scan

__all__ = ["block_scan"]


@torch.no_grad()
def block_scan(A: Tensor, b: Tensor, *, reverse: bool = False) -> Tensor:
    """x_t = A_t x_{t-1} + b_t from x = 0, for every channel on its own; `reverse` runs x_t = A_t x_{t+1} + b_t.

    Shapes: b, x (B, T, S, D), A (B, T, S, S, D). No gradients flow.

    >>> A, b = torch.full((1, 3, 1, 1, 1), 0.5), torch.tensor([4.0, 2.0, 1.0]).view(1, 3, 1, 1)
    >>> block_scan(A, b).flatten().tolist(), block_scan(A, b, reverse=True).flatten().tolist()
    ([4.0, 4.0, 3.0], [5.25, 2.5, 1.0])
    """
    if b.shape[2] == 1:
        return scan(A[:, :, 0, 0], b[:, :, 0], reverse=reverse)[0][:, :, None]
    form = choose(b)
    if form == "numba":
        from tidegate.ops.block_scan.numba_cpu import block_scan as forward
    elif form == "reference":
        from tidegate.ops.block_scan.reference import block_scan as forward
    else:
        from tidegate.ops.block_scan.parallel import block_scan as forward
    return forward(A, b, reverse)
