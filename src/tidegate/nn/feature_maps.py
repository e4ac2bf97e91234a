"""Feature maps of linear attention: what stands in for the exponential in a softmax, phi(q) . phi(k) for exp(q . k)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.ops.pointwise import elu_plus_one

FEATURE_MAPS = ("elu+1", "relu", "softmax", "identity", "taylor", "dpfp", "hedgehog")


class FeatureMap(nn.Module):
    """phi of every head: (B, T, H, K) -> (B, T, H, `features`).

    - "elu+1": elu(x) + 1 (arXiv 2006.16236). "relu", "softmax" over the channels, "identity".
    - "taylor": 1 + s + s^2 / 2 for s = q . k / sqrt(K), the second-order approximation of the softmax's exponential, as
      1 + K + K (K + 1) / 2 features; never below 1/2 (Based, arXiv 2402.18668, whose code keeps both halves of the
      symmetric products).
    - "dpfp": r_i r_{i-1} of r = relu([x, -x]), 2 K features, most of them zero (arXiv 2102.11174, nu = 1).
    - "hedgehog": softmax(x W) and softmax(-x W), 2 K features, W learned for every head and identity at first
      (arXiv 2402.04347).

    Raises ValueError for another name.
    """

    def __init__(
        self,
        name: str,
        num_heads: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if name not in FEATURE_MAPS:
            raise ValueError(f"feature_map: seen {name!r}, wanted one of {', '.join(FEATURE_MAPS)}")
        self.name, self.num_heads, self.dim = name, num_heads, dim
        self.features = {"taylor": 1 + dim + dim * (dim + 1) // 2, "dpfp": 2 * dim, "hedgehog": 2 * dim}.get(name, dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_heads, dim, dim, **factory)) if name == "hedgehog" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W of "hedgehog" is the identity."""
        if self.weight is not None:
            with torch.no_grad():
                self.weight.copy_(torch.eye(self.dim).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "elu+1":
            return elu_plus_one(x)
        if self.name == "relu":
            return functional.relu(x)
        if self.name == "softmax":
            return x.softmax(-1)
        if self.name == "taylor":
            x = x * self.dim**-0.25
            # The products x_i x_j, i < j, stand for two each, and the squares for one: sqrt(1/2) is due to them alone.
            row, column = torch.triu_indices(self.dim, self.dim, 1, device=x.device)
            squares, products = x.square() * 0.5**0.5, x.index_select(-1, row) * x.index_select(-1, column)
            return torch.cat([torch.ones_like(x[..., :1]), x, squares, products], -1)
        if self.name == "dpfp":
            r = functional.relu(torch.cat([x, -x], -1))
            return r * torch.cat([r[..., -1:], r[..., :-1]], -1)
        if self.weight is not None:
            x = torch.einsum("bthi,hij->bthj", x, self.weight)
            return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
        return x

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.num_heads}, {self.dim}"
