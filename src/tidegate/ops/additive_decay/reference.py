"""Additive decay as the equation is written: one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def additive_decay(x: Tensor, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, D), state (B, D)."""
    x = zero_padding(x, segments)
    starts = torch.zeros_like(x[..., 0], dtype=torch.bool) if segments is None else segments.starts
    valid = ~starts if segments is None else segments.valid

    def step(carry, x, start, real):
        (before,) = carry
        z = torch.where(start[:, None], -torch.inf, before)
        empty = z == -torch.inf
        ahead = torch.where(empty, 0, x - torch.where(empty, 0, z))  # of x_t over all that came before
        share = torch.where(empty, 1, torch.sigmoid(ahead))
        log_decay = torch.where(empty, 0, functional.logsigmoid(-ahead))
        after = torch.where(empty, x, z - log_decay)
        results = torch.where(real[:, None, None], torch.stack([share, log_decay], -1), 0)
        return (torch.where(real[:, None], after, before),), results

    (state,), results = over_time(step, (state,), (x, starts, valid))
    share, log_decay = results.unbind(-1)
    return share, log_decay, state
