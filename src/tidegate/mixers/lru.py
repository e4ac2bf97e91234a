"""Linear recurrent unit: a diagonal complex recurrence with eigenvalues on a ring."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.ops import scan
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "lru",
    family="scan",
    paper="lru",
    title="Resurrecting Recurrent Neural Networks for Long Sequences",
    arxiv="2303.06349",
    tiny=dict(state_dim=12),
    presets={
        "medium": dict(r_min=0.9, r_max=0.999),
        "path-x": dict(r_min=0.999, r_max=0.9999, max_phase=math.pi / 10),
    },
)
class LRU(Mixer):
    """Linear recurrent unit (LRU), the layer itself.

    Equation, with N complex states::

        lambda = exp(-exp(nu_log) + i exp(theta_log))        gamma = exp(gamma_log)
        h_t = lambda * h_{t-1} + gamma * (B x_t)             y_t = Re(C h_t) + skip * x_t

    - All N states are kept, without conjugate pairs, and the real part is taken without a factor of two.
    - At initialisation |lambda| is uniform in area on the ring [r_min, r_max] and its phase uniform in [0, max_phase].
      The ring decides what is remembered: r_min near 1 for long inputs (presets "medium" and "path-x"), a small
      max_phase for slow signals.
    - gamma = sqrt(1 - |lambda|^2) gives white noise unit variance. It is learnt from there on, not recomputed;
      `normalise=False` leaves it out.
    - The paper's block around the layer is LRU, GELU, GLU; here that is the model's part.

    `input_weight` (N, 2, dim) holds (Re B, Im B), `output_weight` (dim, N, 2) holds (Re C, -Im C), so that real
    products do the complex arithmetic and |lambda| < 1 whatever the parameters.

    Source: arXiv 2303.06349. Shapes: x, y (B, T, dim), N = state_dim or dim. State: memory (N), complex.
    """

    no_weight_decay = ("nu_log", "theta_log", "gamma_log", "input_weight")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        normalise: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.normalise = dim, state_dim, normalise
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        if state_dim is not None and state_dim < 1:
            raise ValueError(f"state_dim: seen {state_dim}, wanted at least 1, or None for dim")
        if not 0 <= r_min <= r_max <= 1 or r_max == 0:
            raise ValueError(f"r_min, r_max: seen {r_min} and {r_max}, wanted 0 <= r_min <= r_max <= 1 and r_max > 0")
        if not max_phase > 0:
            raise ValueError(f"max_phase: seen {max_phase}, wanted more than 0, for example 2 pi")
        states = state_dim or dim

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.nu_log = nn.Parameter(torch.empty(states, **factory))
        self.theta_log = nn.Parameter(torch.empty(states, **factory))
        self.gamma_log = nn.Parameter(torch.empty(states, **factory)) if normalise else None
        self.input_weight = nn.Parameter(torch.empty(states, 2, dim, **factory))
        self.output_weight = nn.Parameter(torch.empty(dim, states, 2, **factory))
        self.skip = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Eigenvalues on the ring, gamma to match; B ~ N(0, 1 / 2 dim), C ~ N(0, 1 / N) per part; skip ~ N(0, 1)."""
        states = len(self.nu_log)
        # Uniform in area is uniform in the squared radius. In float64: 1 - |lambda|^2 is small on a thin ring.
        area, phase = torch.rand(2, states, dtype=torch.float64, device=self.nu_log.device).clamp(1e-7, 1 - 1e-7)
        nu = -0.5 * torch.log(area * (self.r_max**2 - self.r_min**2) + self.r_min**2)
        nu = nu.clamp(min=1e-8)  # r_min = r_max = 1 would be nu = 0, whose logarithm is not finite
        self.nu_log.copy_(nu.log())
        self.theta_log.copy_(torch.log(self.max_phase * phase))
        if self.gamma_log is not None:
            self.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * nu)))
        nn.init.normal_(self.input_weight, std=(2 * self.dim) ** -0.5)
        nn.init.normal_(self.output_weight, std=states**-0.5)
        nn.init.normal_(self.skip)

    def eigenvalues(self) -> Tensor:
        """lambda (N,), complex, at least complex64."""
        wide = accumulation_dtype(self.nu_log.dtype)
        return torch.polar(torch.exp(-torch.exp(self.nu_log.to(wide))), torch.exp(self.theta_log.to(wide)))

    def state_spec(self) -> dict[str, Any]:
        return {"memory": ((len(self.nu_log),), "complex")}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        weight: Tensor = self.input_weight
        if self.gamma_log is not None:  # gamma B is smaller than B x
            weight = torch.exp(self.gamma_log)[:, None, None] * weight
        inputs = functional.linear(x, weight.flatten(0, 1)).to(accumulation_dtype(x.dtype))
        inputs = inputs.unflatten(-1, (-1, 2))  # (B, T, N, 2)
        h, memory = scan(self.eigenvalues(), torch.view_as_complex(inputs), state=state["memory"], segments=segments)
        y = functional.linear(torch.view_as_real(h).flatten(-2).to(x.dtype), self.output_weight.flatten(1))
        return torch.addcmul(y, self.skip, x), State(memory=memory)
