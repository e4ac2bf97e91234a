"""Additive decay in plain PyTorch: log(exp a + exp b) is associative, so log2(T) rounds give every z."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.segments import Segments


def additive_decay(x: Tensor, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, D), state (B, D)."""
    # A finite number in place of minus infinity: the difference of two of them is no NaN.
    nothing = torch.finfo(x.dtype).min / 4
    valid = torch.ones_like(x[..., 0], dtype=torch.bool) if segments is None else segments.valid
    documents = torch.zeros_like(valid, dtype=torch.long) if segments is None else segments.documents
    valid, documents = valid[..., None], documents[..., None]
    x = torch.where(valid, x, nothing)

    z, shift, time = x, 1, x.shape[1]
    while shift < time:  # afterwards z_t covers the 2 * shift tokens up to t that belong to its document
        ours = documents == _later(documents, shift, -1)
        z = _add(z, torch.where(ours, _later(z, shift, nothing), nothing), nothing)
        shift *= 2
    before = torch.where(state == -torch.inf, nothing, state)[:, None]
    z = torch.where(documents == 0, _add(z, before, nothing), z)

    past = torch.where(documents == _later(documents, 1, -1), _later(z, 1, nothing), nothing)
    first = torch.arange(time, device=x.device)[:, None] == 0
    past = torch.where(first & (documents == 0), before, past)
    empty = past < nothing / 2
    ahead = torch.where(empty, 0, x - past)
    share = torch.where(valid, torch.where(empty, 1, torch.sigmoid(ahead)), 0)
    log_decay = torch.where(valid & ~empty, functional.logsigmoid(-ahead), 0)
    last = z[:, -1]
    return share, log_decay, torch.where(last < nothing / 2, -torch.inf, last)


def _add(a: Tensor, b: Tensor, nothing: float) -> Tensor:
    """log(exp a + exp b), differentiable twice for any a and b, `nothing` included."""
    empty = a < nothing / 2
    return torch.where(empty, b, a - functional.logsigmoid(torch.where(empty, 0, a - b)))


def _later(x: Tensor, steps: int, fill: float) -> Tensor:
    """x_{t - steps} at every t, `fill` where there is none."""
    return functional.pad(x, (0, 0, steps, 0), value=fill)[:, : x.shape[1]]
