"""State space models with full matrices, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def dense_ssm(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """The definition. A product of matrices for each channel, the batch as its columns."""

    def times(matrix: Tensor, h: Tensor) -> Tensor:
        return torch.matmul(matrix, h.permute(1, 2, 0)).permute(2, 0, 1)  # (D, M, N) x (D, N, B)

    def step(carry: tuple[Tensor, ...], u: Tensor, *flags: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (kept,) = carry  # (B, D, N)
        start, real = (flag[:, None, None] for flag in flags) if flags else (None, None)
        before = kept if start is None else torch.where(start, 0, kept)
        h = times(a, before) + b * u[..., None]
        y = times(c, h)
        if real is None:
            return (h,), y
        return (torch.where(real, h, kept),), torch.where(real, y, 0)

    flags = () if segments is None else (segments.starts, segments.valid)
    u = zero_padding(u, segments)  # NaN would come back as a gradient
    (last,), y = over_time(step, (state,), (u, *flags))
    return y, last
