"""Multi-dimensional damped moving average: every channel as a few exponential averages of its past."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import accumulation_dtype
from tidegate.ops import diagonal_ssm
from tidegate.segments import Segments


class MovingAverage(nn.Module):
    """Multi-dimensional damped exponential moving average (MD-EMA): `y, h = average(x, h, segments)`.

    Equation, per channel and state n = 0 ... N - 1::

        p = sigmoid(delta),   q = 1 - p sigmoid(alpha)
        h_t = q h_{t-1} + p beta x_t,                   y_t = sum_n gamma_n h_t[n] / sqrt(N) + omega x_t

    q is in (0, 1), real, and the same for every token. Only p beta gamma matters, so the state is kept without p beta.

    Initialisation: delta, alpha ~ N(0, 0.2); beta = 1, -1, 1, ... + N(0, 0.02); gamma, omega ~ N(0, 1), all but omega
    cut off at two deviations. Source: Mega, arXiv 2209.10655. Shapes: x, y (B, T, dim); h (B, dim, N), real, the sum of
    q^s x_{t-s}, at least float32.
    """

    no_weight_decay = ("delta", "alpha", "beta", "gamma")

    def __init__(
        self,
        dim: int,
        states: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.states = dim, states
        if states < 1:
            raise ValueError(f"states: seen {states}, wanted at least 1")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.delta = nn.Parameter(torch.empty(dim, states, **factory))
        self.alpha = nn.Parameter(torch.empty(dim, states, **factory))
        self.beta = nn.Parameter(torch.empty(dim, states, **factory))
        self.gamma = nn.Parameter(torch.empty(dim, states, **factory))
        self.omega = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        for parameter, std in ((self.delta, 0.2), (self.alpha, 0.2), (self.beta, 0.02), (self.gamma, 1.0)):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        self.beta.add_(1 - 2 * (torch.arange(self.states, device=self.beta.device) % 2))
        nn.init.normal_(self.omega)

    def system(self) -> tuple[Tensor, Tensor]:
        """decay and weight (dim, states) of h_t = decay h_{t-1} + x_t and y_t = sum weight h_t + omega x_t."""
        delta, alpha, beta, gamma = (
            x.to(accumulation_dtype(x.dtype)) for x in (self.delta, self.alpha, self.beta, self.gamma)
        )
        p = torch.sigmoid(delta)
        return 1 - p * torch.sigmoid(alpha), self.states**-0.5 * p * beta * gamma

    def forward(
        self, x: Tensor, state: Tensor | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, Tensor]:
        decay, weight = (_complex(part) for part in self.system())
        before = None if state is None else _complex(state)
        y, last = diagonal_ssm(x, decay, weight, state=before, segments=segments)
        return torch.addcmul(y, self.omega.to(x.dtype), x), torch.view_as_real(last)[..., 0]

    def extra_repr(self) -> str:
        return f"{self.dim}, states={self.states}"


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([x, torch.zeros_like(x)], -1))
