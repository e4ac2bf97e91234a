"""S4D: a diagonal state space model for every channel, in continuous time, with HiPPO's eigenvalues or simpler ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.hippo import nplr
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.state_space import RULES, ChannelMap, complex_weight, discretise
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

INITS = ("legs", "lin", "inv", "real", "quad", "rand")


@register(
    "s4d",
    family="scan",
    paper="dss-s4d",
    title="On the Parameterization and Initialization of Diagonal State Space Models",
    arxiv="2206.11893",
    tiny=dict(state_dim=8),
    presets={name: dict(init=name) for name in ("legs", "inv", "real")},
)
class S4D(Mixer):
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

    input_weight: Tensor
    no_weight_decay = ("log_real", "imag", "input_weight", "log_step")

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
        super().__init__()
        self.dim, self.state_dim, self.init, self.rule, self.output = dim, state_dim, init, rule, output
        self.dt_min, self.dt_max, self.step_rescale = dt_min, dt_max, step_rescale
        self.step_per_state, self.num_systems, self.freeze_input = step_per_state, num_systems, freeze_input
        if init not in INITS:
            raise ValueError(f"init: seen {init!r}, wanted one of {', '.join(INITS)}")
        if state_dim < 1 or (init != "real" and state_dim % 2):
            raise ValueError(f"state_dim: seen {state_dim}, wanted an even number, for conjugate pairs")
        if rule not in RULES:
            raise ValueError(f"rule: seen {rule!r}, wanted one of {', '.join(RULES)}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: seen {dt_min} and {dt_max}, wanted 0 < dt_min <= dt_max")
        if not step_rescale > 0:
            raise ValueError(f"step_rescale: seen {step_rescale}, wanted more than 0")
        systems = dim if num_systems is None else num_systems
        if systems < 1 or dim % systems:
            raise ValueError(f"num_systems: seen {num_systems}, wanted a divisor of dim = {dim}")
        parts = 1 if init == "real" else 2
        states = state_dim // parts

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.log_real = nn.Parameter(torch.empty(systems, states, **factory))
        self.imag = None if init == "real" else nn.Parameter(torch.empty(systems, states, **factory))
        input_weight = torch.empty(systems, states, parts, **factory)
        if freeze_input:
            self.register_buffer("input_weight", input_weight)
        else:
            self.input_weight = nn.Parameter(input_weight)
        self.output_weight = nn.Parameter(torch.empty(dim, states, parts, **factory))
        self.log_step = nn.Parameter(torch.empty(*((dim, states) if step_per_state else (dim,)), **factory))
        self.skip = nn.Parameter(torch.empty(dim, **factory))
        self.output_map = ChannelMap(dim, output, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        N, n = self.state_dim, torch.arange(self.log_real.shape[1], dtype=torch.float64)
        nn.init.constant_(self.log_real, math.log(0.5))
        B = torch.ones(len(n), dtype=torch.complex128)
        if self.imag is None:
            self.log_real.copy_(torch.log(n + 1).expand_as(self.log_real))
        elif self.init == "legs":
            eigenvalues, _, B, _ = nplr("legs", N)
            B = B[: len(n)]
            B.imag.clamp_(-2, 2)  # as in the official code
            self.imag.copy_(eigenvalues.imag[: len(n)].expand_as(self.imag))
        else:
            rules = {"lin": math.pi * n, "inv": N / math.pi * (N / (2 * n + 1) - 1), "quad": (1 + 2 * n) ** 2 / math.pi}
            random = self.init == "rand"
            self.imag.copy_(torch.randn(self.imag.shape).exp() if random else rules[self.init].expand_as(self.imag))
        self.input_weight.copy_(torch.view_as_real(B)[:, : self.input_weight.shape[-1]].expand_as(self.input_weight))
        nn.init.normal_(self.output_weight, std=self.output_weight.shape[-1] ** -0.5)
        nn.init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.skip)
        self.output_map.reset_parameters()

    def state_spec(self) -> dict[str, Any]:
        return {"memory": ((self.dim, self.log_real.shape[1]), "complex")}

    def discretised(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay, B and C (dim, states), complex, of h_t = decay * h_{t-1} + B x_t and z_t = Re sum C * h_t."""
        wide = accumulation_dtype(self.log_real.dtype)
        real = -torch.exp(self.log_real.to(wide))
        imag = torch.zeros_like(real) if self.imag is None else self.imag.to(wide)
        copies = self.dim // real.shape[0]
        step = self.step_rescale * torch.exp(self.log_step.to(wide)).view(self.dim, -1)
        decay, scale = discretise(real.repeat(copies, 1), imag.repeat(copies, 1), step, self.rule)
        B, C = complex_weight(self.input_weight.to(wide)), complex_weight(self.output_weight.to(wide))
        return decay, scale * B.repeat(copies, 1), self.output_weight.shape[-1] * C

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """decay, weight (dim, states) and skip (dim): h_t = decay * h_{t-1} + x_t, z_t = Re sum weight * h_t + skip * x_t."""
        decay, B, C = self.discretised()
        weight, skip = B * C, self.skip
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
