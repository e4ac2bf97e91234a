"""The recurrence of blocks as a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time


def block_scan(A: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """As `tidegate.ops.block_scan`."""

    def step(carry: tuple[Tensor, ...], A: Tensor, b: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        x = (A * carry[0][:, None]).sum(2) + b
        return (x,), x

    return over_time(step, (torch.zeros_like(b[:, 0]),), (A, b), reverse=reverse)[1]
