"""mLSTM as the papers write it: one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    maximum: Tensor,
    scale: float,
    eps: float,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (B, T, H, K), v (B, T, H, V), gates (B, T, H), memory (B, H, K, V), normaliser (B, H, K), maximum (B, H)."""
    starts = torch.zeros_like(q[:, :, 0, 0], dtype=torch.bool) if segments is None else segments.starts
    valid = ~starts if segments is None else segments.valid

    def step(carry, q, k, v, log_i, log_f, start, real):
        C, n, m = (torch.where(_like(start, x), torch.zeros_like(x), x) for x in carry)
        # 1. the running maximum, and the gates relative to it   2. forget and write   3. read
        m_new = torch.where(log_f + m > log_i, log_f + m, log_i)
        f, i = torch.exp(log_f + m - m_new), torch.exp(log_i - m_new)
        C = f[..., None, None] * C + i[..., None, None] * k[..., :, None] * v[..., None, :]
        n = f[..., None] * n + i[..., None] * k
        numerator = scale * torch.einsum("bhk,bhkv->bhv", q, C)
        denominator = torch.maximum((scale * q * n).sum(-1).abs(), torch.exp(-m_new)) + eps
        h = numerator / denominator[..., None]
        after = tuple(
            torch.where(_like(real, x), x, x_before) for x, x_before in zip((C, n, m_new), carry, strict=True)
        )
        return after, torch.where(_like(real, h), h, torch.zeros_like(h))

    (memory, normaliser, maximum), h = over_time(
        step, (memory, normaliser, maximum), (q, k, v, log_input, log_decay, starts, valid)
    )
    return h, memory, normaliser, maximum


def _like(flag: Tensor, x: Tensor) -> Tensor:
    return flag.reshape(-1, *[1] * (x.ndim - 1))
