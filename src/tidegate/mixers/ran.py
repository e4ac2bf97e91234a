"""Recurrent additive network: an LSTM whose memory is a weighted sum of its inputs, and nothing else."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

EQUATIONS = """
    i = sigmoid(W_i @ x + U_i @ {h})
    f = sigmoid(W_f @ x + U_f @ {h})
    c = i * (W_c @ x) + f * c
"""
CELLS = {
    "tanh": Cell(EQUATIONS.format(h="h") + "h = tanh(c)", "h c"),
    "identity": Cell(EQUATIONS.format(h="c"), "c"),
}


@register(
    "ran",
    family="cell",
    paper="recurrent-cells",
    title="Recurrent Additive Networks",
    arxiv="1705.07393",
    presets={"identity": dict(nonlinearity="identity"), "heads": dict(num_heads=4)},
)
class RAN(CellMixer):
    """Recurrent additive network (RAN), hidden size dim.

    Equation::

        i, f = sigmoid(W_i x_t + b_i + U_i h_{t-1}), sigmoid(W_f x_t + b_f + U_f h_{t-1})
        c_t = i * (W_c x_t) + f * c_{t-1}               y_t = h_t = tanh(c_t)     or c_t, with nonlinearity="identity"

    - What is written does not see the state and has no bias: c_t is a sum of W_c x_1 ... W_c x_t with weights between 0
      and 1, channel by channel, which the gates compute. As i and f are not coupled it can grow with the length.
    - `forget_bias` is b_f at initialisation: above 0 the cell starts by keeping its state.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: weights uniform in ±dim^(-1/2), b_i zero and b_f `forget_bias`.
    Source: arXiv 1705.07393 and its code; heads 2412.07752. Shapes: x, y (B, T, dim).
    State: h, c (dim), or c alone with "identity".
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        nonlinearity: str = "tanh",
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.nonlinearity, self.forget_bias = dim, nonlinearity, forget_bias
        if nonlinearity not in CELLS:
            raise ValueError(f"nonlinearity: seen {nonlinearity!r}, wanted 'tanh' or 'identity'")
        self._build(CELLS[nonlinearity], num_heads, device, dtype, biased=2)  # the gates

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        self._set_bias("W_i", 0.0)
        self._set_bias("W_f", self.forget_bias)
