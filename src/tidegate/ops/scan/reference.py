"""The diagonal linear recurrence, token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def scan(a: Tensor, b: Tensor, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """The definition. a, b (B, T, D), state (B, D), all of one dtype."""
    a, b = zero_padding(a, segments), zero_padding(b, segments)  # NaN on padding would come back as a gradient
    if b.is_complex():  # as pairs of real numbers, because that is what a compiled loop can do
        a, b, state = (torch.view_as_real(x.resolve_conj()) for x in (a, b, state))
        h, state = _loop(_complex_product, a, b, state, segments)
        return torch.view_as_complex(h.contiguous()), torch.view_as_complex(state.contiguous())
    return _loop(torch.mul, a, b, state, segments)


def _loop(
    product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    def step(carry: tuple[Tensor, ...], a: Tensor, b: Tensor, *flags: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (before,) = carry
        if not flags:
            h = product(a, before) + b
            return (h,), h
        start, real = (flag.reshape(-1, *[1] * (b.ndim - 1)) for flag in flags)
        h = product(a, torch.where(start, 0, before)) + b
        return (torch.where(real, h, before),), torch.where(real, h, 0)

    flags = () if segments is None else (segments.starts, segments.valid)
    (state,), h = over_time(step, (state,), (a, b, *flags))
    return h, state


def _complex_product(x: Tensor, y: Tensor) -> Tensor:
    """(..., 2) and (..., 2): real and imaginary parts."""
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], dim=-1)
