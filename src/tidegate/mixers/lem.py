"""Long expressive memory: two layers of states, each moving by steps of time that the network chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

CELL = Cell(
    """
    d = dt * sigmoid(W_1 @ x + U_1 @ h)
    e = dt * sigmoid(W_2 @ x + U_2 @ h)
    z = (1 - d) * z + d * tanh(W_z @ x + U_z @ h)
    h = (1 - e) * h + e * tanh(W_y @ x + U_y @ z)
    """,
    "h z",
)


@register(
    "lem",
    family="cell",
    paper="recurrent-cells",
    title="Long Expressive Memory for Sequence Modeling",
    arxiv="2110.04744",
    presets={"heads": dict(num_heads=4)},
)
class LEM(CellMixer):
    """Long expressive memory (LEM), hidden size dim.

    Equation, h being the paper's y::

        d = dt * sigmoid(W_1 x_t + b_1 + U_1 h_{t-1})
        e = dt * sigmoid(W_2 x_t + b_2 + U_2 h_{t-1})
        z_t = (1 - d) * z_{t-1} + d * tanh(W_z x_t + b_z + U_z h_{t-1})
        y_t = h_t = (1 - e) * h_{t-1} + e * tanh(W_y x_t + b_y + U_y z_t)

    - The steps d and e are gates between what was and what comes, and lengths of time: channels that take small ones
      live on a slow scale. `dt` is the longest step; over 10,000 tokens of the adding problem the authors have 0.024.
      States begin at 0 and stay within ±(1 - (1 - dt)^t).
    - A token takes two dependent products, as U_y reads the new z.
    - The authors' code has a second bias for each recurrent product: add it to the first. Its rows of inputs are in the
      order 2, 1, y, z, though it calls the third z and the fourth y; those of products with h are 2, 1, z.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: uniform in ±dim^(-1/2).
    Source: arXiv 2110.04744; heads 2412.07752. Shapes: x, y (B, T, dim). State: h, z (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        dt: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.dt = dim, dt
        if not 0 < dt <= 1:
            raise ValueError(f"dt: seen {dt}, wanted more than 0 and at most 1")
        self._build(CELL, num_heads, device, dtype, vectors=False)

    def _biases(self) -> tuple[Tensor, Tensor | None]:
        return self.bias_ih, self._constants()
