"""Bistable recurrent cell: a channel feeds back on itself, strongly enough to stay where it was put, or not."""

from __future__ import annotations

import torch
from torch import nn

from tidegate.nn.cell import CellMixer
from tidegate.nn.orthogonal import orthogonal_
from tidegate.ops.cell import Cell
from tidegate.registry import register

LAST = "h = c * h + (1 - c) * tanh(W_h @ x + a * h)"
CELLS = {
    False: Cell(f"a = 1 + tanh(W_a @ x + w_a * h)\nc = sigmoid(W_c @ x + w_c * h)\n{LAST}", "h"),
    True: Cell(f"a = 1 + tanh(W_a @ x + U_a @ h)\nc = sigmoid(W_c @ x + U_c @ h)\n{LAST}", "h"),
}


@register(
    "brc",
    family="cell",
    paper="recurrent-cells",
    title="A bio-inspired bistable recurrent cell allows for long-lasting memory",
    arxiv="2006.05252",
    presets={"nbrc": dict(neuromodulated=True), "heads": dict(neuromodulated=True, num_heads=4)},
)
class BRC(CellMixer):
    """Bistable recurrent cell (BRC), hidden size dim.

    Equation::

        a = 1 + tanh(W_a x_t + b_a + w_a * h_{t-1})     c = sigmoid(W_c x_t + b_c + w_c * h_{t-1})
        y_t = h_t = c * h_{t-1} + (1 - c) * tanh(W_h x_t + b_h + a * h_{t-1})

    - a, between 0 and 2, is how strongly a channel feeds back. Left alone, it returns to 0 where a < 1; where a > 1 it
      has two resting places, the solutions of h = tanh(a h) on both sides of 0, and stays at the one it was pushed to,
      for any length of time. c is how slowly it moves.
    - w_a and w_c are vectors: a channel sees no other, they meet in the next layer.
    - `neuromodulated` (the nBRC) makes them matrices U_a and U_c, so that channels set each other's feedback. That is a
      GRU with reset="before" whose candidate sees its own channel alone, U_n = 2 I.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less. Without
      matrices it changes nothing.
    - b_h is not in the authors' code. It starts at zero; what pushes a channel always one way costs it one of the two
      places.

    Initialisation (official code): W Glorot uniform, w_a = w_c = 1, biases zero, and U orthogonal, as in
    its first version; later it is Glorot's, too.
    Source: arXiv 2006.05252; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        neuromodulated: bool = False,
        num_heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.neuromodulated = dim, neuromodulated
        self._build(CELLS[neuromodulated], num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        for weight in self.weight_ih.split(self.dim):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.bias_ih)
        if self.vectors is not None:
            nn.init.ones_(self.vectors)
        if self.weight_hh is not None:
            orthogonal_(self.weight_hh, self.weight_hh.shape[1])
