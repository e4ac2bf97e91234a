"""Rotary position embedding: a position becomes an angle, a distance a difference of angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Turn channel pairs by angles proportional to the position, for any position: there is no table to outgrow.

    (x_i, x_{i + D/2}) is rotated by positions * theta^(-2i/D), i = 0 .. D/2 - 1: the pairing of halves, as in Llama's
    published weights, not of neighbours as in the paper; the two differ by a fixed permutation of the channels.

    x (B, T, H, D) with D even; positions (B or 1, T), integers. Source: Su et al. 2021, arXiv 2104.09864.

    >>> q, k = torch.randn(2, 1, 1, 1, 8)
    >>> at = lambda i: torch.tensor([[i]])
    >>> near, far = (rotary(q, at(i + 3)) * rotary(k, at(i)) for i in (0, 1000))
    >>> torch.allclose(near.sum(), far.sum(), atol=1e-4)
    True
    """
    half = x.shape[-1] // 2
    # Angles in float64, reduced to one turn: in float32 position 100,000 would be off by 0.006.
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None] * frequency).remainder(2 * math.pi)[:, :, None]  # (B, T, 1, D/2)
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = angle.to(wide)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(wide).split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
