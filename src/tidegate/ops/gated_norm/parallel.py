"""RMS norm and gate in plain PyTorch: any device and dtype, differentiable twice. It has no time, so no other loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def gated_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, activation: str, norm_before_gate: bool
) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    factor = None if gate is None else getattr(functional, activation)(gate.to(x.dtype))
    if factor is not None and not norm_before_gate:
        x = x * factor
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(x.dtype)
    return (y * factor if factor is not None and norm_before_gate else y).to(dtype)
