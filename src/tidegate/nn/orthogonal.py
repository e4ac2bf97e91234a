"""Orthogonal matrices at initialisation, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import accumulation_dtype


@torch.no_grad()
def orthogonal_(weight: Tensor, rows: int | None = None, gain: float = 1.0) -> None:
    """Fill a matrix, or every block of `rows` of its rows, with `gain` times an orthogonal one.

    A block with more rows than columns has orthogonal columns.
    """
    for block in weight.split(rows or weight.shape[0]):
        # PyTorch's QR decomposition is not there for half precision.
        block.copy_(nn.init.orthogonal_(torch.empty_like(block, dtype=accumulation_dtype(block.dtype)), gain=gain))
