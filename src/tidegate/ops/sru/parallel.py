"""The simple recurrent unit in plain PyTorch: a scan where gates do not see the state, else the loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.scan.parallel import scan
from tidegate.ops.sru import reference
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
    if weight is not None:
        return reference.sru(x, projected, bias, weight, alpha, state, segments)
    x, projected = zero_padding(x, segments), zero_padding(projected, segments)
    u, f, r = projected.chunk(3, -1)
    f, r = torch.sigmoid(f + bias[0]), torch.sigmoid(r + bias[1])
    c, state = scan(f, (1 - f) * u, state, segments)
    return r * c + (1 - r) * (alpha * x), state
