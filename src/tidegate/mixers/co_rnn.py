"""Coupled oscillatory recurrent network: every channel is a damped oscillator, driven by all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

FORCE = "tanh(W_z @ x + U_h @ h + U_z @ z) - gamma * h"
CELLS = {
    False: Cell(f"z = z + dt * ({FORCE} - epsilon * z)\nh = h + dt * z", "h z"),
    True: Cell(f"z = (z + dt * ({FORCE})) / (1 + dt * epsilon)\nh = h + dt * z", "h z"),
}


@register(
    "co-rnn",
    family="cell",
    paper="recurrent-cells",
    title="Coupled Oscillatory Recurrent Neural Network (coRNN): An accurate and (gradient) stable architecture for "
    "learning long time dependencies",
    arxiv="2010.00951",
    presets={
        "psmnist": dict(dt=0.076, gamma=0.4, epsilon=8.0),
        "adding": dict(dt=0.06, gamma=66.0, epsilon=15.0),
        "heads": dict(num_heads=4),
    },
)
class CoRNN(CellMixer):
    """Coupled oscillatory recurrent network (coRNN), hidden size dim.

    Equation, for the position h (the paper's y) and the velocity z of the oscillators::

        z_t = z_{t-1} + dt (tanh(W x_t + b + U_h h_{t-1} + U_z z_{t-1}) - gamma h_{t-1} - epsilon z_{t-1})
        y_t = h_t = h_{t-1} + dt z_t

    - `dt` is the time from token to token, sqrt(`gamma`) an oscillator's angular frequency without damping, `epsilon`
      its damping. They decide how long it remembers, and belong to the lengths of a task: the authors tune all three.
      The defaults are theirs for MNIST by pixels, the presets "psmnist" and "adding" those for permuted pixels and the
      adding problem.
    - `implicit` damps by epsilon z_t, the new velocity, the paper's other scheme. Left alone, an oscillator of the
      explicit scheme settles if 2 dt epsilon + dt^2 gamma < 4, of the implicit one if dt^2 gamma < 4 + 2 dt epsilon;
      other values raise ValueError. As tanh is bounded, so are then the states, whatever is learnt.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation (official code): uniform in ±n^(-1/2), n the numbers that enter a channel, dim + 2 dim / num_heads.
    Source: arXiv 2010.00951; heads 2412.07752. Shapes: x, y (B, T, dim). State: h, z (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        dt: float = 0.042,
        gamma: float = 2.7,
        epsilon: float = 4.7,
        implicit: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.dt, self.gamma, self.epsilon, self.implicit = dim, dt, gamma, epsilon, implicit
        for name, value in (("dt", dt), ("gamma", gamma), ("epsilon", epsilon)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: seen {value}, wanted more than 0")
        if implicit and dt**2 * gamma >= 4 + 2 * dt * epsilon:
            raise ValueError(f"dt: seen {dt}, too long a step: wanted dt^2 gamma < 4 + 2 dt epsilon")
        if not implicit and 2 * dt * epsilon + dt**2 * gamma >= 4:
            raise ValueError(f"dt: seen {dt}, too long a step: wanted 2 dt epsilon + dt^2 gamma < 4, or implicit=True")
        self._build(CELLS[implicit], num_heads, device, dtype, vectors=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        assert self.weight_hh is not None
        bound = (self.weight_ih.shape[1] + 2 * self.weight_hh.shape[1]) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _biases(self) -> tuple[Tensor, Tensor | None]:
        return self.bias_ih, self._constants()
