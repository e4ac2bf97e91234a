"""Light gated recurrent unit: a GRU that never resets, with relu in the place of tanh."""

from __future__ import annotations

import math

import torch
from torch import nn

from tidegate.nn.cell import CellMixer
from tidegate.nn.orthogonal import orthogonal_
from tidegate.ops.cell import Cell
from tidegate.registry import register

CELLS = {
    name: Cell(
        f"""
        z = sigmoid(W_z @ x + U_z @ h)
        n = {name}(W_n @ x + U_n @ h)
        h = z * h + (1 - z) * n
        """,
        "h",
    )
    for name in ("relu", "tanh")
}


@register(
    "li-gru",
    family="cell",
    paper="recurrent-cells",
    title="Light Gated Recurrent Units for Speech Recognition",
    arxiv="1803.10225",
    tiny=dict(nonlinearity="tanh"),  # tests make U thirty times as large, where relu has to overflow
    presets={"tanh": dict(nonlinearity="tanh"), "heads": dict(num_heads=4)},
)
class LiGRU(CellMixer):
    """Light gated recurrent unit (Li-GRU), hidden size dim.

    Equation::

        z = sigmoid(W_z x_t + b_z + U_z h_{t-1})        n = relu(W_n x_t + b_n + U_n h_{t-1})
        y_t = h_t = z * h_{t-1} + (1 - z) * n

    - The paper normalises W_z x and W_n x over the batch, which is outside of the cell and not built here.
      Nothing bounds the state of relu, less so without it; `nonlinearity="tanh"` is bounded.
    - Of the paper's dropout, one mask for all tokens on n, there is none here.
    - `forget_bias` is b_z at initialisation: above 0 the cell starts by keeping its state.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: W uniform, Glorot's; U orthogonal, block by block; b_n zero and b_z `forget_bias`.
    Source: arXiv 1803.10225; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        nonlinearity: str = "relu",
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.nonlinearity, self.forget_bias = dim, nonlinearity, forget_bias
        if nonlinearity not in CELLS:
            raise ValueError(f"nonlinearity: seen {nonlinearity!r}, wanted 'relu' or 'tanh'")
        self._build(CELLS[nonlinearity], num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        assert self.weight_hh is not None
        bound = math.sqrt(6 / (self.dim + self.weight_ih.shape[1]))
        nn.init.uniform_(self.weight_ih, -bound, bound)
        orthogonal_(self.weight_hh, self.weight_hh.shape[1])
        self._set_bias("W_z", self.forget_bias)
        self._set_bias("W_n", 0.0)
