"""Antisymmetric recurrent network: a differential equation whose states turn and do not grow, in steps of Euler's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tidegate.nn.cell import CellMixer
from tidegate.nn.mixer import accumulation_dtype
from tidegate.ops.cell import Cell
from tidegate.registry import register

CELLS = {
    False: Cell("h = h + epsilon * tanh(W_h @ x + A @ h - gamma * h)", "h"),
    True: Cell(
        """
        v = A @ h - gamma * h
        z = sigmoid(W_z @ x + v)
        h = h + epsilon * z * tanh(W_h @ x + v)
        """,
        "h",
    ),
}


@register(
    "antisymmetric-rnn",
    family="cell",
    paper="recurrent-cells",
    title="AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks",
    arxiv="1902.09689",
    presets={"gated": dict(gated=True), "heads": dict(num_heads=4)},
)
class AntisymmetricRNN(CellMixer):
    """Antisymmetric recurrent network, hidden size dim.

    Equation::

        A = U - U^T - gamma I
        y_t = h_t = h_{t-1} + epsilon * tanh(W_h x_t + b_h + A h_{t-1})

    with `gated`, whose gate shares the matrix::

        z = sigmoid(W_z x_t + b_z + A h_{t-1})
        y_t = h_t = h_{t-1} + epsilon * z * tanh(W_h x_t + b_h + A h_{t-1})

    - Whatever U is learnt, the eigenvalues of A are -gamma + i omega: in continuous time a state turns without growing,
      and fades at the rate gamma. `epsilon` is the step of Euler's method, which turns outwards: a mode grows by
      |1 + epsilon (-gamma + i omega)| per token where tanh is straight, and `gamma` is there to counter that. The
      defaults are those of the paper's simulation, for omega = 2.
    - Only the difference U - U^T counts: of the numbers in U, half would do.
    - Nothing bounds the state but that a token moves no channel by more than epsilon.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: W normal with variance 1 / dim, U normal with half of num_heads / dim, so that U - U^T has
    num_heads / dim and omega is at most about 2; biases zero.
    Source: arXiv 1902.09689; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        gated: bool = False,
        epsilon: float = 0.1,
        gamma: float = 0.15,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.gated, self.epsilon, self.gamma = dim, gated, epsilon, gamma
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon: seen {epsilon}, wanted a step size above 0")
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma: seen {gamma}, wanted a strength of diffusion of at least 0")
        self._build(CELLS[gated], num_heads, device, dtype, vectors=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        assert self.weight_hh is not None
        nn.init.normal_(self.weight_ih, std=self.weight_ih.shape[1] ** -0.5)
        nn.init.normal_(self.weight_hh, std=(2 * self.weight_hh.shape[1]) ** -0.5)
        nn.init.zeros_(self.bias_ih)

    def _matrices(self) -> Tensor:
        U = super()._matrices()
        assert U is not None
        U = U.to(accumulation_dtype(U.dtype))
        return U - U.mT

    def _biases(self) -> tuple[Tensor, Tensor | None]:
        return self.bias_ih, self._constants()
