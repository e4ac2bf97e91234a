"""Short causal depthwise convolution on whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.segments import Segments


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, segments: Segments | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """One product per column of `weight`, on the inputs behind the tail of the earlier call."""
    if segments is None:
        y, tail = _without_segments(x, weight, bias, state)
    else:
        y, tail = _with_segments(x, weight, bias, state, segments)
    return (functional.silu(y) if silu else y), tail


def _without_segments(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    width, time = weight.shape[1], x.shape[1]
    extended = torch.cat([state, x], dim=1)  # (B, W - 1 + T, D)
    y = x * weight[:, width - 1]
    for column in range(width - 1):
        y = y + extended[:, column : column + time] * weight[:, column]
    return (y if bias is None else y + bias), extended[:, time:]


def _with_segments(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The same with a table of predecessors, because neighbours in the window need not be neighbours in the row."""
    batch, time, dim = x.shape
    width = weight.shape[1]
    # Slot 0 is a zero, slots 1 ... W - 1 the tail of the earlier call, slots W ... the tokens of this one.
    extended = torch.cat([x.new_zeros(batch, 1, dim), state, x], dim=1)
    before = segments.previous()
    continues = (before < 0) & segments.valid & ~segments.starts
    first = torch.where(continues, width - 1, 0)
    tail_slots = torch.arange(width, device=x.device).sub(1).clamp(min=0).expand(batch, width)
    predecessor = torch.cat([tail_slots, torch.where(before >= 0, before + width, first)], dim=1)

    def take(slots: Tensor) -> Tensor:
        return extended.gather(1, slots[..., None].expand(-1, -1, dim))

    slots = torch.arange(time, device=x.device).add(width).expand(batch, time)
    y = x * weight[:, width - 1]
    for column in range(width - 2, -1, -1):
        slots = predecessor.gather(1, slots)
        y = y + take(slots) * weight[:, column]
    y = segments.zero_padding(y if bias is None else y + bias)

    token = torch.arange(time, device=x.device).add(width)
    slot = torch.where(segments.valid, token, width - 1).amax(1, keepdim=True)  # the last real token, if there is one
    tail = [slot]
    for _ in range(width - 2):
        tail.append(predecessor.gather(1, tail[-1]))
    return y, take(torch.cat(tail[::-1][: width - 1], dim=1)) if width > 1 else x[:, :0]
