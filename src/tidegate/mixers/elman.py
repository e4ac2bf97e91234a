"""Elman network: the plain recurrent network, one matrix on the input and one on the state."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer
from tidegate.nn.orthogonal import orthogonal_
from tidegate.ops.cell import Cell
from tidegate.registry import register

CELLS = {name: Cell(f"h = {name}(W_h @ x + U_h @ h)", "h") for name in ("tanh", "relu")}
STARTS = ("uniform", "orthogonal", "identity")


@register(
    "elman",
    family="cell",
    paper="recurrent-cells",
    title="Finding Structure in Time (Elman, 1990)",
    presets={
        "irnn": dict(nonlinearity="relu", recurrent_init="identity"),
        "orthogonal": dict(recurrent_init="orthogonal"),
        "heads": dict(num_heads=4),
    },
)
class Elman(CellMixer):
    """Elman network, hidden size dim.

    Equation::

        y_t = h_t = tanh(W x_t + b + U h_{t-1} + b')               or relu, with nonlinearity="relu"

    - Parameters and the two biases are those of torch.nn.RNN and RNNCell.
    - `recurrent_init` is how U starts: "uniform" as in PyTorch; "orthogonal", which makes lags of some twenty tokens
      learnable; "identity", with biases of zero, which makes relu a sum over time to begin with (preset "irnn").
      Nothing bounds the state of relu.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: uniform in ±dim^(-1/2) but for `recurrent_init`.
    Source: Elman 1990; identity arXiv 1504.00941; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        nonlinearity: str = "tanh",
        recurrent_init: str = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.nonlinearity, self.recurrent_init = dim, nonlinearity, recurrent_init
        if nonlinearity not in CELLS:
            raise ValueError(f"nonlinearity: seen {nonlinearity!r}, wanted 'tanh' or 'relu'")
        if recurrent_init not in STARTS:
            raise ValueError(f"recurrent_init: seen {recurrent_init!r}, wanted one of {', '.join(map(repr, STARTS))}")
        self._build(CELLS[nonlinearity], num_heads, device, dtype, second_bias=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        if self.recurrent_init == "uniform":
            return
        assert self.weight_hh is not None
        if self.recurrent_init == "orthogonal":
            orthogonal_(self.weight_hh, self.weight_hh.shape[1])
        else:
            for block in self.weight_hh.split(self.weight_hh.shape[1]):
                torch.nn.init.eye_(block)
            self._set_bias("W_h", 0.0)
