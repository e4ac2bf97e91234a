"""The same in plain PyTorch: any device and dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def rg_lru_gates(u: Tensor, gates: Tensor, rate: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    r, i = (gate.flatten(-2) for gate in torch.sigmoid(gates.to(wide)).chunk(2, -1))
    log_a = -rate.to(wide) * r
    scale = torch.where(first[..., None], 1, _clipped_sqrt(-torch.expm1(2 * log_a)))
    return log_a.exp(), scale * i * u.to(wide)


def _clipped_sqrt(z: Tensor) -> Tensor:
    """sqrt(z), with the derivative 1 / sqrt(max(4 z, 1e-6))."""
    small = 4 * z < 1e-6
    root = torch.sqrt(torch.where(small, 1, z))
    return torch.where(small, torch.sqrt(z.detach()) + 1e3 * (z - z.detach()), root)
