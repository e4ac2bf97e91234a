"""The simple recurrent unit, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def sru(
    x: Tensor,
    projected: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    alpha: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """The definition; see `tidegate.ops.sru`."""
    x, projected = zero_padding(x, segments), zero_padding(projected, segments)  # NaN would come back as a gradient
    v = torch.zeros_like(bias) if weight is None else weight

    def step(
        carry: tuple[Tensor, ...], x: Tensor, projected: Tensor, *flags: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        (kept,) = carry
        before = torch.where(flags[0][:, None], 0, kept) if flags else kept
        # 1. Both gates look at the state before the update.
        u, f, r = projected.chunk(3, -1)
        f, r = torch.sigmoid(torch.stack([f, r], 1) + v * before[:, None] + bias).unbind(1)
        # 2. Update, and read out beside the highway.
        c = f * before + (1 - f) * u
        y = r * c + (1 - r) * (alpha * x)
        if not flags:
            return (c,), y
        real = flags[1][:, None]
        return (torch.where(real, c, kept),), torch.where(real, y, 0)

    flags = () if segments is None else (segments.starts, segments.valid)
    (state,), y = over_time(step, (state,), (x, projected, *flags))
    return y, state
