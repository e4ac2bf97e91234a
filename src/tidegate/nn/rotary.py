"""Rotary position embedding: a position becomes an angle, a distance a difference of angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tidegate.ops.pointwise import rotate
from tidegate.segments import Segments


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
    return rotate(x, *rotations(x, positions, theta))


def rotations(x: Tensor, positions: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """The cosines and sines by which `rotate` turns x, queries and keys alike: (B or 1, T, D/2), at least float32."""
    half = x.shape[-1] // 2
    # Angles in float64, reduced to one turn: in float32 position 100,000 would be off by 0.006.
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None] * frequency).remainder(2 * math.pi)
    angle = angle.to(torch.promote_types(x.dtype, torch.float32))
    return angle.cos(), angle.sin()


def token_positions(x: Tensor, before: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """(B, T) positions of tokens in their documents after `before` (B,) earlier ones, and (B,) the count at the end."""
    if segments is None:
        positions = before[:, None] + torch.arange(x.shape[1], device=x.device)
        return positions, before + x.shape[1]
    ours = segments.in_last_document()
    continues = ~(segments.starts.any(1))
    return segments.positions(before), ours.sum(1) + torch.where(continues, before, 0)
