"""Mixers: one file per architecture, each mapping `x, state -> y, state`.

>>> mixer = build("gla", dim=32, num_heads=2)
>>> y, state = mixer(torch.randn(1, 5, 32))
"""

import torch

from tidegate.registry import build, info, names

__all__ = ["build", "info", "names", "torch"]
