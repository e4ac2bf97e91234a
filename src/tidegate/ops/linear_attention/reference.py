"""Linear attention as the papers write it: one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, K), v (B, T, H, V), log_decay None or (B, T, H, 1 or K), state (B, H, K, V)."""
    dtype = state.dtype
    if log_decay is None:
        log_decay = torch.zeros_like(q[..., :1])
    starts = torch.zeros_like(q[:, :, 0, 0], dtype=torch.bool) if segments is None else segments.starts
    valid = ~starts if segments is None else segments.valid

    def step(carry, q, k, v, g, start, real):
        (before,) = carry
        fresh = torch.where(start[:, None, None, None], torch.zeros_like(before), before)
        # 1. forget   2. write   3. read
        after = g.exp()[..., None] * fresh + k[..., :, None] * v[..., None, :]
        after = torch.where(real[:, None, None, None], after, before)
        o = scale * torch.einsum("bhk,bhkv->bhv", q, after)
        return (after,), torch.where(real[:, None, None], o, torch.zeros_like(o))

    inputs = (q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype), starts, valid)
    (state,), o = over_time(step, (state,), inputs)
    return o, state
