"""Short causal depthwise convolution, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, segments: Segments | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """The definition: slide a window of the last W real inputs along each row."""
    everywhere = torch.ones_like(x[..., 0], dtype=torch.bool)
    starts, valid = (~everywhere, everywhere) if segments is None else (segments.starts, segments.valid)

    def step(carry: tuple[Tensor, ...], now: Tensor, start: Tensor, real: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (tail,) = carry
        start, real = start[:, None], real[:, None]
        # 1. A new document begins with an empty window.
        window = torch.where(start[..., None], 0, tail)
        # 2. The current token joins it; the products are summed over the window.
        window = torch.cat([window, now[:, None]], dim=1)  # (B, W, D)
        y = torch.einsum("bwd,dw->bd", window, weight)
        y = y if bias is None else y + bias
        y = torch.nn.functional.silu(y) if silu else y
        # 3. The oldest token leaves it. Padding changes nothing.
        return (torch.where(real[..., None], window[:, 1:], tail),), torch.where(real, y, 0)

    (tail,), y = over_time(step, (state,), (x, starts, valid))
    return y, tail
