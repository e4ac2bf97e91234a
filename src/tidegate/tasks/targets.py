"""What every task agrees on: which targets are scored, and how sizes that make no sense are refused."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # a target that is not scored; what torch's cross-entropy skips. Real-valued targets have NaN there


def scored(targets: Tensor) -> Tensor:
    """True where a target counts: it is not IGNORE, or not NaN where targets are real numbers."""
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORE


def unscored(*shape: int) -> Tensor:
    """int64 targets of which none is scored yet."""
    return torch.full(shape, IGNORE)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size below 1, naming it."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: seen {size}, wanted at least 1")


def check_range(name: str, ends: tuple[int, int], least: int = 1) -> None:
    """Raise ValueError unless `ends` are a smallest and a largest whole number, the smallest at least `least`."""
    low, high = ends
    if not least <= low <= high:
        raise ValueError(f"{name}: seen {low} to {high}, wanted a range such as ({least}, {least + 8})")
