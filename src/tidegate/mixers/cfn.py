"""Chaos-free network: a state that fades, towards zero where nothing comes in, and gates on what fades and comes."""

from __future__ import annotations

import torch
from torch import nn

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

SCALE = 0.07  # of the paper's weights

CELL = Cell(
    """
    f = sigmoid(W_f @ x + U_f @ h)
    i = sigmoid(W_i @ x + U_i @ h)
    h = f * tanh(h) + i * tanh(W @ x)
    """,
    "h",
)


@register(
    "cfn",
    family="cell",
    paper="recurrent-cells",
    title="A recurrent neural network without chaos",
    arxiv="1612.06212",
    presets={"heads": dict(num_heads=4)},
)
class CFN(CellMixer):
    """Chaos-free network (CFN), hidden size dim.

    Equation, with the gates f and i that the paper calls theta and eta::

        f, i = sigmoid(W_f x_t + b_f + U_f h_{t-1}), sigmoid(W_i x_t + b_i + U_i h_{t-1})
        y_t = h_t = f * tanh(h_{t-1}) + i * tanh(W x_t)

    - W x has no bias: from x = 0 on every channel goes to zero, whatever the weights, and |h| stays below 2.
    - `forget_bias` and `input_bias` are b_f and b_i at initialisation.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: weights uniform in ±0.07, b_f and b_i as given.
    Source: arXiv 1612.06212; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        forget_bias: float = 1.0,
        input_bias: float = -1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.forget_bias, self.input_bias = dim, forget_bias, input_bias
        self._build(CELL, num_heads, device, dtype, biased=2)  # the gates

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        assert self.weight_hh is not None
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -SCALE, SCALE)
        self._set_bias("W_f", self.forget_bias)
        self._set_bias("W_i", self.input_bias)
