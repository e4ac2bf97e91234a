"""The diagonal linear recurrence, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def scan(a: Tensor, b: Tensor, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """The definition. a, b (B, T, D), state (B, D), all of one dtype."""
    a, b = zero_padding(a, segments), zero_padding(b, segments)  # NaN on padding would come back as a gradient

    def step(carry: tuple[Tensor, ...], a: Tensor, b: Tensor, *flags: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (before,) = carry
        if not flags:
            h = a * before + b
            return (h,), h
        start, real = (flag[:, None] for flag in flags)
        h = a * torch.where(start, 0, before) + b
        return (torch.where(real, h, before),), torch.where(real, h, 0)

    flags = () if segments is None else (segments.starts, segments.valid)
    (state,), h = over_time(step, (state,), (a, b, *flags))
    return h, state
