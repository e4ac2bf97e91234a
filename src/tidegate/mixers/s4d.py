"""S4D: a diagonal state space model for every channel, in continuous time, with HiPPO's eigenvalues or simpler ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer
from tidegate.nn.state_space import ChannelMap, DiagonalSystem
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


@register(
    "s4d",
    family="scan",
    paper="dss-s4d",
    title="On the Parameterization and Initialization of Diagonal State Space Models",
    arxiv="2206.11893",
    tiny=dict(state_dim=8),
    presets={name: dict(init=name) for name in ("legs", "inv", "real")},
)
class S4D(Mixer, DiagonalSystem):
    """Diagonal state space model (S4D).

    Equation, per channel, with N / 2 eigenvalues l, one of each conjugate pair, and then at steps of exp(log_step)::

        h' = l h + B x,       z = 2 Re(C h) + skip * x,      y = glu(gelu(z) W)            l = -exp(log_real) + i imag
        h_t = exp(step l) * h_{t-1} + (exp(step l) - 1) / l * B x_t                        rule "zoh"

    - `rule`: "zoh", "bilinear", "trapezoid", or "dirac", which takes x as impulses (nn/state_space.py).
    - `init` of l, n = 0 ... N/2 - 1: "lin" -1/2 + i pi n; "inv" -1/2 + i N/pi (N / (2n + 1) - 1); "legs" HiPPO's
      normal part, with its B; "quad" (1 + 2n)^2 / pi and "rand" exp(N(0, 1)) as imaginary parts. "real" is a model with
      N real eigenvalues -(n + 1), without the factor 2. B = 1 but for "legs".
    - Only B * C matters; `freeze_input` leaves B untrained. `num_systems` < dim shares l and B among channels.
    - `step_rescale` multiplies the steps, for input sampled at another rate than in training. `step_per_state` learns
      a step for every state instead of every channel.
    - `output="linear"` is y = gelu(z) W, "none" y = z.

    A whole sequence is computed by walking along it with the states in registers. Measured at dim 256, N 64 and T 2048
    on one core that takes 1.5 us per token; our convolution by FFT takes 11 times as long at batch 16 and 130 times at
    batch 1, nearly all of it to make the kernel.

    Initialisation: C ~ N(0, 1) (complex), skip ~ N(0, 1), steps log-uniform in [dt_min, dt_max], W as torch.nn.Linear.
    Source: arXiv 2206.11893. Shapes: x, y (B, T, dim).
    State: memory (dim, N / 2), or (dim, N) for "real", complex: h without the factor (exp(step l) - 1) / l * B.
    """

    no_weight_decay = DiagonalSystem.no_weight_decay

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        init: str = "lin",
        rule: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        step_rescale: float = 1.0,
        step_per_state: bool = False,
        num_systems: int | None = None,
        freeze_input: bool = False,
        output: str = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        steps: dict[str, Any] = {"rule": rule, "dt_min": dt_min, "dt_max": dt_max, "step_per_state": step_per_state}
        shared: dict[str, Any] = {"num_systems": num_systems, "freeze_input": freeze_input}
        DiagonalSystem.__init__(self, dim, state_dim=state_dim, init=init, **steps, **shared, **factory)
        self.step_rescale, self.output = step_rescale, output
        if not step_rescale > 0:
            raise ValueError(f"step_rescale: seen {step_rescale}, wanted more than 0")
        self.skip = nn.Parameter(torch.empty(dim, **factory))
        self.output_map = ChannelMap(dim, output, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        DiagonalSystem.reset_parameters(self)
        nn.init.normal_(self.skip)
        self.output_map.reset_parameters()

    def state_spec(self) -> dict[str, Any]:
        return {"memory": ((self.dim, self.log_real.shape[1]), "complex")}

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay, weight (dim, states), complex, and skip (dim) of the recurrence in its cheapest form.

        h_t = decay * h_{t-1} + x_t,  z_t = Re sum weight * h_t + skip * x_t
        """
        decay, B, C = self.discretised(self.step_rescale)
        weight = B * C
        skip: Tensor = self.skip
        if self.rule == "trapezoid":  # half of what is new; see nn/state_space.py
            skip = skip - weight.real.sum(-1).to(skip.dtype) / 2
        return decay, weight, skip

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        decay, weight, skip = self.system()
        z, memory = diagonal_ssm(x, decay, weight, state=state["memory"], segments=segments)
        y = self.output_map(torch.addcmul(z, skip, x))
        return zero_padding(y, segments), State(memory=memory)
