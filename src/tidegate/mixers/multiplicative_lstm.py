"""Multiplicative LSTM: each input has transitions of its own between states, as factors inside of the products."""

from __future__ import annotations

import torch
from torch import nn

from tidegate.nn.cell import CellMixer
from tidegate.nn.orthogonal import orthogonal_
from tidegate.ops.cell import Cell
from tidegate.registry import register

CELL = Cell(
    """
    m = (W_m @ x) * (U_m @ h)
    i = sigmoid(W_i @ x + U_i @ m)
    f = sigmoid(W_f @ x + U_f @ m)
    g = tanh(W_g @ x + U_g @ m)
    o = sigmoid(W_o @ x + U_o @ m)
    c = f * c + i * g
    h = o * tanh(c)
    """,
    "h c",
)


@register(
    "multiplicative-lstm",
    family="cell",
    paper="recurrent-cells",
    title="Multiplicative LSTM for sequence modelling",
    arxiv="1609.07959",
    presets={"heads": dict(num_heads=4)},
)
class MultiplicativeLSTM(CellMixer):
    """Multiplicative LSTM, its authors' mLSTM, hidden size dim.

    Equation::

        m = (W_m x_t + b_m) * (U_m h_{t-1})
        i, f, o = sigmoid(W x_t + b + U m)                  g = tanh(the same with weights of its own)
        c_t = f * c_{t-1} + i * g                           y_t = h_t = o * tanh(c_t)

    - An LSTM that reads m in the place of h: for each x, the gates see h through another matrix, U diag(W_m x) U_m.
      An unlikely input can so take the network to quite another state. The mLSTM of the xLSTM is something else.
    - A token takes two dependent products.
    - b_m is not in the paper. It starts at zero; at 1, with W_m = 0 and U_m = I, this is an LSTM.
    - `forget_bias` is b_f at initialisation; the authors have 3.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.
    - The authors' weight normalisation is not here.

    Initialisation (official code): W_m and U_m orthogonal, and so are the other W as one matrix, and the other U as
    one; biases zero but for b_f. Weights are in the order m, i, f, g, o.
    Source: arXiv 1609.07959; heads 2412.07752. Shapes: x, y (B, T, dim). State: h, c (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        forget_bias: float = 3.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.forget_bias = dim, forget_bias
        self._build(CELL, num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        assert self.weight_hh is not None
        for weight, heads in ((self.weight_ih, 1), (self.weight_hh, self.num_heads)):
            for block in weight.view(5, heads, -1, weight.shape[1]).transpose(0, 1):
                orthogonal_(block[0])
                gates = block[1:].flatten(0, 1)
                orthogonal_(gates)
                block[1:] = gates.view_as(block[1:])
        nn.init.zeros_(self.bias_ih)
        self._set_bias("W_f", self.forget_bias)
