"""Gated recurrent unit, with either place of its reset."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.nn.cell import CellMixer, check_chrono
from tidegate.ops.cell import Cell
from tidegate.registry import register

EQUATIONS = """
    r = sigmoid(W_r @ x + U_r @ h)
    z = sigmoid(W_z @ x + U_z @ h)
    n = {candidate}
    h = (1 - z) * n + z * h
"""
CELLS = {
    "after": Cell(EQUATIONS.format(candidate="tanh(W_n @ x + r * (U_n @ h + b_n))"), "h"),
    "before": Cell(EQUATIONS.format(candidate="tanh(W_n @ x + U_n @ (r * h))"), "h"),
}


@register("gru", family="cell", paper="recurrent-cells", title="Gated recurrent unit", arxiv="1406.1078")
class GRU(CellMixer):
    """Gated recurrent unit (GRU), hidden size dim.

    Equation::

        r, z = sigmoid(W x_t + b + U h_{t-1} + b')
        n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + b'_n))            reset="after", as in cuDNN, PyTorch and Keras
        n = tanh(W_n x_t + b_n + U_n (r * h_{t-1}) + b'_n)            reset="before", as in the paper
        y_t = h_t = (1 - z) * n + z * h_{t-1}

    - z is what is kept; where a source has z and 1 - z swapped, negate its rows of the weights and biases.
    - Parameters, their order r, z, n and the two biases are those of torch.nn.GRU and GRUCell. Weights trained with one
      kind of reset are wrong for the other. "before" takes two dependent products per token.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.
    - `forget_bias` is the bias of z at initialisation, exactly (one of PyTorch's two biases is zero): above 0 the cell
      starts by keeping. `chrono_length` instead draws log U(1, length - 1), for memories of up to that many tokens.

    Source: arXiv 1406.1078; heads 2412.07752; chrono initialisation 1804.11188. Shapes: x, y (B, T, dim).
    State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        reset: str = "after",
        forget_bias: float = 0.0,
        chrono_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.reset, self.forget_bias, self.chrono_length = dim, reset, forget_bias, chrono_length
        if reset not in CELLS:
            raise ValueError(f"reset: seen {reset!r}, wanted 'after' or 'before'")
        check_chrono(chrono_length)
        self._build(CELLS[reset], num_heads, device, dtype, second_bias=True, vectors=False)  # b_n is of bias_hh

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±dim^(-1/2) but for the bias of z."""
        super().reset_parameters()
        self._set_bias("W_z", self.forget_bias if self.chrono_length is None else self._chrono_bias(self.chrono_length))

    def _biases(self) -> tuple[Tensor, Tensor | None]:
        if self.reset == "before":
            return super()._biases()
        assert self.bias_hh is not None
        gates, own = self.bias_hh.split([2 * self.dim, self.dim])
        return torch.cat([self.bias_ih[: 2 * self.dim] + gates, self.bias_ih[2 * self.dim :]]), own[None]
