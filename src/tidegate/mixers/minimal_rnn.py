"""MinimalRNN: the input decides what is written, the gate only how much of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

# Its x is z: what depends on the input alone is computed for all tokens beforehand.
CELL = Cell(
    """
    u = sigmoid(W_u @ x + U_u @ h)
    h = u * h + (1 - u) * x
    """,
    "h",
)


@register(
    "minimal-rnn",
    family="cell",
    paper="recurrent-cells",
    title="MinimalRNN: Toward More Interpretable and Trainable Recurrent Neural Networks",
    arxiv="1711.06788",
    presets={"heads": dict(num_heads=4)},
)
class MinimalRNN(CellMixer):
    """MinimalRNN, hidden size dim.

    Equation::

        z_t = tanh(W x_t + b)                           u = sigmoid(W_u z_t + b_u + U_u h_{t-1})
        y_t = h_t = u * h_{t-1} + (1 - u) * z_t

    - What is written, z, does not see the state: channel by channel, h_t is a weighted average of z_1 ... z_t and of
      the state before them. The paper admits any network in the place of tanh(W x + b), which is `encoder` here.
    - `forget_bias` is b_u at initialisation: above 0 the cell starts by keeping its state.
    - `num_heads` makes U_u block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: uniform in ±dim^(-1/2) but for b_u.
    Source: arXiv 1711.06788; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.forget_bias = dim, forget_bias
        self.encoder = nn.Linear(dim, dim, device=device, dtype=dtype)
        self._build(CELL, num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        self._set_bias("W_u", self.forget_bias)

    def with_input_size(self, size: int) -> CellMixer:
        """The same cell for inputs of another width than dim, drawn anew."""
        factory: dict[str, Any] = {"device": self.weight_ih.device, "dtype": self.weight_ih.dtype}
        self.encoder = nn.Linear(size, self.dim, **factory)
        self.reset_parameters()
        return self

    def run(self, x: Tensor, state: State, segments: Segments | None) -> tuple[Tensor, State]:
        """`forward` after its checks, for an x of any width that `encoder` takes."""
        return super().run(torch.tanh(self.encoder(x)), state, segments)
