"""Update gate network and intersection network: one gate between what was and what comes."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

STATE = """
    g = sigmoid(W_g @ x + U_g @ h)
    c = tanh(W_c @ x + U_c @ h)
"""
OUTPUT = """
    p = sigmoid(W_p @ x + U_p @ h)
    q = relu(W_q @ x + U_q @ h)
    y = p * x + (1 - p) * q
"""
LAST = "h = g * h + (1 - g) * c"
CELLS = {False: Cell(STATE + LAST, "h"), True: Cell(STATE + OUTPUT + LAST, "h")}


@register(
    "ugrnn",
    family="cell",
    paper="recurrent-cells",
    title="Capacity and Trainability in Recurrent Neural Networks",
    arxiv="1611.09913",
    presets={"intersection": dict(intersection=True), "heads": dict(num_heads=4)},
)
class UGRNN(CellMixer):
    """Update gate network (UGRNN), hidden size dim.

    Equation::

        g = sigmoid(W_g x_t + b_g + U_g h_{t-1})        c = tanh(W_c x_t + b_c + U_c h_{t-1})
        h_t = g * h_{t-1} + (1 - g) * c                 y_t = h_t

    with `intersection` (the +RNN) the output is gated too, between the input and a candidate of its own::

        p = sigmoid(W_p x_t + b_p + U_p h_{t-1})        q = relu(W_q x_t + b_q + U_q h_{t-1})
        y_t = p * x_t + (1 - p) * q

    - `forget_bias` is b_g, and b_p, at initialisation: above 0 the cell starts by keeping its state, and by handing on
      its input. In TensorFlow's cells this constant is added to a bias of zero whenever they run: add it to b_g and b_p
      of their weights.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: uniform in ±dim^(-1/2) but for b_g and b_p.
    Source: arXiv 1611.09913; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        intersection: bool = False,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.intersection, self.forget_bias = dim, intersection, forget_bias
        self._build(CELLS[intersection], num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        self._set_bias("W_g", self.forget_bias)
        if self.intersection:
            self._set_bias("W_p", self.forget_bias)
