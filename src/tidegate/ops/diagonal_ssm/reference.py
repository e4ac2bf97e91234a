"""Diagonal state space models, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def diagonal_ssm(
    u: Tensor, decay: Tensor, weight: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """The definition, in pairs of real numbers, because that is what a compiled loop can do."""
    u = zero_padding(u, segments)  # NaN would come back as a gradient
    a, w = torch.view_as_real(decay.resolve_conj()), torch.view_as_real(weight.resolve_conj())

    def step(carry: tuple[Tensor, ...], u: Tensor, *flags: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (kept,) = carry  # (B, D, N, 2)
        start, real = (flag[:, None, None, None] for flag in flags) if flags else (None, None)
        before = kept if start is None else torch.where(start, 0, kept)
        h = torch.stack(
            [
                a[..., 0] * before[..., 0] - a[..., 1] * before[..., 1] + u[..., None],
                a[..., 0] * before[..., 1] + a[..., 1] * before[..., 0],
            ],
            dim=-1,
        )
        y = (w[..., 0] * h[..., 0] - w[..., 1] * h[..., 1]).sum(-1)
        if real is None:
            return (h,), y
        return (torch.where(real, h, kept),), torch.where(real[..., 0, 0], y, 0)

    flags = () if segments is None else (segments.starts, segments.valid)
    (last,), y = over_time(step, (torch.view_as_real(state.resolve_conj()),), (u, *flags))
    return y, torch.view_as_complex(last.contiguous())
