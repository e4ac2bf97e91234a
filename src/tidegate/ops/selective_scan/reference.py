"""The selective scan, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    state: Tensor,
    segments: Segments | None,
    negative: bool,
) -> tuple[Tensor, Tensor]:
    """The definition; see `tidegate.ops.selective_scan`."""
    x, dt, b, c = (zero_padding(tensor, segments) for tensor in (x, dt, b, c))  # NaN would come back as a gradient

    def step(
        carry: tuple[Tensor, ...], x: Tensor, dt: Tensor, b: Tensor, c: Tensor, *flags: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        (before,) = carry
        # 1. The step size decides how much is forgotten and how much is taken in.
        size = dt if bias is None else functional.softplus(dt + bias)  # (B, D)
        decay = torch.exp(size[..., None] * a)  # (B, D, N)
        if negative:
            decay = 2 * decay - 1
        taken = (size * x)[..., None] * b[:, None]
        # 2. Update and read out.
        if not flags:
            h = decay * before + taken
            return (h,), (h * c[:, None]).sum(-1)
        start, real = (flag[:, None, None] for flag in flags)
        h = decay * torch.where(start, 0, before) + taken
        y = (h * c[:, None]).sum(-1)
        return (torch.where(real, h, before),), torch.where(real[..., 0], y, 0)

    flags = () if segments is None else (segments.starts, segments.valid)
    (state,), y = over_time(step, (state,), (x, dt, b, c, *flags))
    # 3. What does not depend on the past.
    if d is not None:
        y = y + d * x
    if z is not None:
        y = y * functional.silu(zero_padding(z, segments))
    return y, state
