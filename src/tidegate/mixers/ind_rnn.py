"""Independently recurrent network: every channel remembers alone, through one number of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

CELLS = {name: Cell(f"h = {name}(W_h @ x + u * h)", "h") for name in ("relu", "tanh")}


@register(
    "ind-rnn",
    family="cell",
    paper="recurrent-cells",
    title="Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN",
    arxiv="1803.04831",
    tiny=dict(max_recurrent=0.8),  # nothing bounds relu once |u| > 1, and tests move every weight a little
)
class IndRNN(CellMixer):
    """Independently recurrent network (IndRNN), hidden size dim.

    Equation, channel by channel::

        y_t = h_t = relu(W x_t + b + u * h_{t-1})                  or tanh, with nonlinearity="tanh"

    - u is a vector: channels meet in the next layer. While relu stays positive it is a linear recurrence, which keeps
      what it has read for as long as u is near 1; with |u| > 1 it grows without bound.
    - `constrain_()` therefore clips u to ±bound, bound = gamma^(1 / length), or 1 if no `length` of the sequences is
      given. It belongs after every optimiser step, as in the paper: `tidegate train` and the tasks call it, so should a
      training loop of your own. Weight decay leaves u alone.
    - u starts uniform in (0, `max_recurrent`), by default the bound. `only_last` is for a last layer of which only the
      last output is read, where every channel needs a long memory: u starts uniform in (1 / bound, bound).

    Initialisation: W uniform in ±dim^(-1/2), b zero, u as above.
    Source: arXiv 1803.04831. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        nonlinearity: str = "relu",
        length: int | None = None,
        gamma: float = 2.0,
        max_recurrent: float | None = None,
        only_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.nonlinearity, self.length, self.gamma = dim, nonlinearity, length, gamma
        self.max_recurrent, self.only_last = max_recurrent, only_last
        if nonlinearity not in CELLS:
            raise ValueError(f"nonlinearity: seen {nonlinearity!r}, wanted 'relu' or 'tanh'")
        if length is not None and length < 1:
            raise ValueError(f"length: seen {length}, wanted at least 1 token, or None")
        if gamma < 1:
            raise ValueError(f"gamma: seen {gamma}, wanted at least 1")
        if max_recurrent is not None and not 0 < max_recurrent <= self.bound:
            bound = f"the bound, {self.bound:.6g}"
            raise ValueError(f"max_recurrent: seen {max_recurrent}, wanted more than 0 and at most {bound}, or None")
        self.u = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))  # of one axis, as what bounds it is its own
        self._build(CELLS[nonlinearity], 1, device, dtype, vectors=False)
        self.no_weight_decay = ("u",)

    @property
    def bound(self) -> float:
        """The largest |u| that `constrain_` leaves."""
        return 1.0 if self.length is None else float(self.gamma ** (1 / self.length))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        nn.init.zeros_(self.bias_ih)
        high = self.max_recurrent or self.bound
        low, high = (1 / self.bound, self.bound) if self.only_last else (0.0, high)
        nn.init.uniform_(self.u, low, high)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Clip u to ±bound."""
        self.u.clamp_(-self.bound, self.bound)

    def _biases(self) -> tuple[Tensor, Tensor | None]:
        return self.bias_ih, self.u[None]
