"""Slot scores as the paper writes them: one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments


def slot_scores(
    q: Tensor, k: Tensor, slots: Tensor, log_decay: Tensor, scale: float, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, K), slots and log_decay (B, T, H, M), state (B, H, M, K), all of one dtype."""
    starts = torch.zeros_like(q[:, :, 0, 0], dtype=torch.bool) if segments is None else segments.starts
    valid = ~starts if segments is None else segments.valid

    def step(carry, q, k, slots, g, start, real):
        (before,) = carry
        fresh = torch.where(start[:, None, None, None], 0, before)
        # 1. forget   2. write   3. compare
        after = g.exp()[..., None] * fresh + slots[..., :, None] * k[..., None, :]
        after = torch.where(real[:, None, None, None], after, before)
        o = scale * torch.einsum("bhmk,bhk->bhm", after, q)
        return (after,), torch.where(real[:, None, None], o, 0)

    (state,), o = over_time(step, (state,), (q, k, slots, log_decay, starts, valid))
    return o, state
