"""Gated state space: a diagonal state space model in a narrow space, multiplied by a wide gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.state_space import complex_weight, discretise
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


@register(
    "gss",
    family="scan",
    paper="gss",
    title="Long Range Language Modeling via Gated State Spaces",
    arxiv="2206.13947",
    tiny=dict(state_dim=6, expand=2),
    presets={
        "paper": dict(state_dim=512),
        "real": dict(imag="none"),
    },
)
class GSS(Mixer):
    """Gated state space layer (GSS).

    Equation, with N eigenvalues l = -exp(log_real) + i exp(imag) for all features, v of width H, u of width F::

        u = gelu(x W_1)        v = LayerNorm(gelu(x W_2))
        h_t = exp(l) * h_{t-1} + (exp(l) - 1) / l * v_t           z_t = Re(C h_t) + skip * v_t          per feature of v
        y = (u * (z W_3)) W_4

    - Time steps are 1, there is no B, and all N states are kept, without conjugate pairs and the factor 2.
    - F = `expand` dim, and H = `narrow` dim: the recurrence costs little beside the products, which is the point.
    - `imag` says what is learnt of the imaginary parts: "exp" their logarithms, "linear" themselves, "none" leaves real
      eigenvalues. The paper has N = 512 (preset "paper"); the default is less, for a state of H N numbers.
    - HiPPO has no part in it: at first half of the states decay faster than exp(-1) per token, and only the slowest few
      live for tens of tokens.

    Initialisation: log_real, imag, C and skip ~ N(0, 1), C in both parts; the products as torch.nn.Linear.
    Source: arXiv 2206.13947. Shapes: x, y (B, T, dim).
    State: memory (H, N), complex: h without the factor (exp(l) - 1) / l.
    """

    no_weight_decay = ("log_real", "imag_parameter")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        expand: float = 4.0,
        narrow: float = 0.25,
        imag: str = "exp",
        bias: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.expand, self.narrow = dim, state_dim, expand, narrow
        self.imag, self.bias, self.norm_eps = imag, bias, norm_eps
        if state_dim < 1:
            raise ValueError(f"state_dim: seen {state_dim}, wanted at least 1")
        if imag not in ("exp", "linear", "none"):
            raise ValueError(f"imag: seen {imag!r}, wanted 'exp', 'linear' or 'none'")
        for name, share in (("expand", expand), ("narrow", narrow)):
            if share * dim < 1 or share * dim != int(share * dim):
                raise ValueError(f"{name}: {share:g} * dim = {share * dim:g}, wanted a whole number of features")
        self.gate_dim, self.inner_dim = int(expand * dim), int(narrow * dim)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, self.gate_dim + self.inner_dim, bias=bias, **factory)  # W_1, W_2
        self.norm = nn.LayerNorm(self.inner_dim, eps=norm_eps, **factory)
        self.log_real = nn.Parameter(torch.empty(state_dim, **factory))
        self.imag_parameter = None if imag == "none" else nn.Parameter(torch.empty(state_dim, **factory))
        parts = 1 if imag == "none" else 2
        self.output_weight = nn.Parameter(torch.empty(self.inner_dim, state_dim, parts, **factory))  # C
        self.skip = nn.Parameter(torch.empty(self.inner_dim, **factory))
        self.up_proj = nn.Linear(self.inner_dim, self.gate_dim, bias=bias, **factory)  # W_3
        self.o_proj = nn.Linear(self.gate_dim, dim, bias=bias, **factory)  # W_4
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        for parameter in (self.log_real, self.imag_parameter, self.output_weight, self.skip):
            if parameter is not None:
                nn.init.normal_(parameter)

    def state_spec(self) -> dict[str, Any]:
        return {"memory": ((self.inner_dim, self.state_dim), "complex")}

    def system(self) -> tuple[Tensor, Tensor]:
        """decay and weight (H, N), complex, of h_t = decay * h_{t-1} + v_t and z_t = Re sum weight * h_t."""
        wide = accumulation_dtype(self.log_real.dtype)
        real = -torch.exp(self.log_real.to(wide))
        imaginary = torch.zeros_like(real) if self.imag_parameter is None else self.imag_parameter.to(wide)
        if self.imag == "exp":
            imaginary = torch.exp(imaginary)
        decay, scale = discretise(real, imaginary, torch.ones_like(real))
        weight = scale * complex_weight(self.output_weight.to(wide))
        return decay.expand_as(weight), weight

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        u, v = functional.gelu(self.in_proj(x)).split([self.gate_dim, self.inner_dim], -1)
        v = self.norm(v)
        z, memory = diagonal_ssm(v, *self.system(), state=state["memory"], segments=segments)
        y = self.o_proj(u * self.up_proj(torch.addcmul(z, self.skip, v)))
        return zero_padding(y, segments), State(memory=memory)
