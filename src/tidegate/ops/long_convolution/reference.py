"""Long convolutions as their definition says: for each token, keep it, then sum over what is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments


def long_convolution(x: Tensor, past: Tensor, length: Tensor, taps: Tensor, segments: Segments | None) -> Tensor:
    """`ops.long_convolution` after its checks, token by token; padding of x is zero."""
    batch, time = x.shape[:2]
    kept = torch.cat([past, torch.zeros_like(x)], dim=1)  # (B, L + T, D), with room for the tokens of this call
    slot, filter = torch.arange(kept.shape[1], device=x.device), taps.t()
    if segments is None:
        valid = torch.ones(batch, time, dtype=torch.bool, device=x.device)
        segments = Segments(torch.zeros_like(valid), valid)

    def step(carry: tuple[Tensor, ...], x: Tensor, start: Tensor, valid: Tensor, p: Tensor):
        (kept,) = carry
        # 1. A new document begins with nothing.
        kept = torch.where(start[:, None, None], 0, kept)
        # 2. A real token takes the slot of its position.
        here = valid[:, None] & (slot == p[:, None])
        kept = torch.where(here[..., None], x[:, None], kept)
        # 3. The sum over all before it and itself.
        lag = p[:, None] - slot
        tap = torch.where((lag >= 0)[..., None], filter[lag.clamp(min=0)], 0)  # (B, L + T, D)
        return (kept,), (tap * kept).sum(1)

    _, y = over_time(step, (kept,), (x, segments.starts, segments.valid, segments.positions(length)))
    return y


def two_sided_convolution(x: Tensor, filter: Tensor, future: Tensor) -> Tensor:
    """As a product with a matrix, y_t = sum_s M[t - s] x_s, channel by channel."""
    time = x.shape[1]
    taps = torch.cat([future.flip(1), filter], dim=1)  # of the lags 1 - T ... T - 1
    order = torch.arange(time, device=x.device)
    matrix = taps[:, order[:, None] - order + time - 1]  # (D, T, T)
    return torch.einsum("dts,bsd->btd", matrix, x)
