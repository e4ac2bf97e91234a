"""Simple recurrent unit: a light recurrence, channel by channel, with a highway around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer
from tidegate.ops.sru import sru
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "sru",
    family="cell",
    paper="recurrent-cells",
    title="Simple Recurrent Units for Highly Parallelizable Recurrence",
    arxiv="1709.02755",
    presets={"v1": dict(gates_see_state=False)},
)
class SRU(Mixer):
    """Simple recurrent unit (SRU), hidden size dim.

    Equation::

        u_t, f_t, r_t = W x_t,  sigmoid(W_f x_t + v_f * c_{t-1} + b_f),  sigmoid(W_r x_t + v_r * c_{t-1} + b_r)
        c_t = f_t * c_{t-1} + (1 - f_t) * u_t
        y_t = r_t * c_t + (1 - r_t) * alpha * x_t

    - Both gates read the state before the update. v_f makes the recurrence nonlinear, so that it has no form that is
      parallel in time: the kernel goes token by token, which costs it nothing, but in float64, under torch.func and on
      other devices it is a loop in Python. `gates_see_state=False` is SRU's first version: v = 0, a linear scan.
    - `highway=False` leaves the second term of y out. alpha = sqrt(1 + 2 exp(highway_bias)) keeps the variance of x
      through many layers; `rescale=False` makes it 1. It is a constant and does not follow b_r as that is learnt.
    - `rank` factors W, W_f and W_r into dim -> rank -> 3 dim.
    - `forget_bias` and `highway_bias` are b_f and b_r at initialisation.

    Initialisation: weights U(±sqrt(3 / fan_in)), variance 1 / fan_in; v ~ U(±sqrt(3 / 2)), and with v the two gates'
    rows of W times sqrt(1 / 2), so that a gate's two terms have the variance of one.
    Source: arXiv 1709.02755 and its code. Shapes: x, y (B, T, dim). State: memory (dim).
    """

    no_weight_decay = ("gate_bias", "gate_state_weight")

    def __init__(
        self,
        dim: int,
        *,
        gates_see_state: bool = True,
        highway: bool = True,
        rescale: bool = True,
        rank: int | None = None,
        forget_bias: float = 0.0,
        highway_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.gates_see_state, self.highway, self.rescale = dim, gates_see_state, highway, rescale
        self.rank, self.forget_bias, self.highway_bias = rank, forget_bias, highway_bias
        if rank is not None and rank < 1:
            raise ValueError(f"rank: seen {rank}, wanted at least 1, or None for full matrices")
        self.alpha = math.sqrt(1 + 2 * math.exp(highway_bias)) if rescale else 1.0

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down_proj = None if rank is None else nn.Linear(dim, rank, bias=False, **factory)
        self.ufr_proj = nn.Linear(rank or dim, 3 * dim, bias=False, **factory)
        self.gate_bias = nn.Parameter(torch.empty(2, dim, **factory))  # b_f and b_r
        self.gate_state_weight = nn.Parameter(torch.empty(2, dim, **factory)) if gates_see_state else None  # v_f, v_r
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        for part in (self.down_proj, self.ufr_proj):
            if part is not None:
                bound = math.sqrt(3 / part.in_features)
                nn.init.uniform_(part.weight, -bound, bound)
        nn.init.constant_(self.gate_bias[0], self.forget_bias)
        nn.init.constant_(self.gate_bias[1], self.highway_bias)
        if self.gate_state_weight is not None:
            nn.init.uniform_(self.gate_state_weight, -math.sqrt(1.5), math.sqrt(1.5))
            self.ufr_proj.weight[self.dim :] *= math.sqrt(0.5)

    def state_spec(self) -> dict[str, Any]:
        return {"memory": (self.dim,)}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        projected = self.ufr_proj(x if self.down_proj is None else self.down_proj(x))
        alpha = self.alpha if self.highway else 0.0
        weights = (self.gate_bias, self.gate_state_weight)
        y, memory = sru(x, projected, *weights, alpha=alpha, state=state["memory"], segments=segments)
        return y, State(memory=memory)
