"""Mamba: a state space model per channel whose input, forgetting and read-out are chosen by the token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import ShortConvolution, log_uniform_steps
from tidegate.ops import selective_scan
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "mamba",
    family="selective_scan",
    paper="mamba",
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    arxiv="2312.00752",
    tiny=dict(state_dim=4),
    presets={"130m": dict(state_dim=16), "falcon-mamba-7b": dict(use_bcdt_norm=True)},
)
class Mamba(Mixer):
    """Mamba (S6): every channel has a diagonal state space of its own, with a step size chosen by the token.

    Equation, per channel (h and a are vectors of N numbers; B, C shared by all channels)::

        u = silu(conv(x W_u)),   z = x W_z,   [r, B, C] = u W_x
        Delta = softplus(r W_dt + dt_bias),   a = -exp(log_a)
        h_t = exp(Delta_t a) h_{t-1} + Delta_t u_t B_t        o_t = <C_t, h_t> + d u_t
        y = (o * silu(z)) W_o

    - The paper's stack has no feed-forward layer between these (`feed_forward="none"` in a LanguageModel).
    - B is discretised by Delta B, as the paper's code does, not by the exact integral.
    - `use_bcdt_norm` puts an RMSNorm on each of r, B and C (Jamba, Falcon Mamba), which keeps large models stable.
    - `negative_eigenvalues` makes the decay 2 exp(Delta a) - 1, so that a state can change its sign (arXiv 2411.12537).
    - a starts at -1, ..., -N in every channel, d at 1, softplus(dt_bias) log-uniform in [1e-3, 0.1]; W_dt uniform in
      ±dt_rank^(-1/2). None of log_a, d, dt_bias has weight decay.

    Source: arXiv 2312.00752. Shapes: x, y (B, T, dim); dim_inner = expand dim; r has dt_rank entries, ceil(dim / 16)
    without it. State: convolution (conv_width - 1, dim_inner), memory (dim_inner, N); N = state_dim.
    """

    no_weight_decay = ("log_a", "dt_bias", "d")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv_width: int = 4,
        use_bcdt_norm: bool = False,
        norm_eps: float = 1e-6,
        negative_eigenvalues: bool = False,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.expand, self.dt_rank, self.conv_width = (
            dim,
            state_dim,
            expand,
            dt_rank,
            conv_width,
        )
        self.use_bcdt_norm, self.norm_eps = use_bcdt_norm, norm_eps
        self.negative_eigenvalues, self.num_layers = negative_eigenvalues, num_layers
        self.inner = int(expand * dim)
        if self.inner != expand * dim or self.inner < 1:
            raise ValueError(f"expand: expand * dim = {expand * dim:g} channels; wanted a whole number, at least 1")
        for name, value in (("state_dim", state_dim), ("dt_rank", dt_rank), ("conv_width", conv_width)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: seen {value}, wanted at least 1")
        rank = dt_rank or -(-dim // 16)
        self.widths = (rank, state_dim, state_dim)  # r, B, C

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u_proj = nn.Linear(dim, self.inner, bias=False, **factory)
        self.z_proj = nn.Linear(dim, self.inner, bias=False, **factory)
        self.convolution = ShortConvolution(self.inner, conv_width, bias=True, **factory)
        self.x_proj = nn.Linear(self.inner, sum(self.widths), bias=False, **factory)
        self.norms = (
            nn.ModuleList(nn.RMSNorm(width, eps=norm_eps, **factory) for width in self.widths)
            if use_bcdt_norm
            else None
        )
        self.dt_proj = nn.Linear(rank, self.inner, bias=False, **factory)
        self.dt_bias = nn.Parameter(torch.empty(self.inner, **factory))
        self.log_a = nn.Parameter(torch.empty(self.inner, state_dim, **factory))
        self.d = nn.Parameter(torch.empty(self.inner, **factory))
        self.o_proj = nn.Linear(self.inner, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring; the other projections as PyTorch, the last divided by sqrt(num_layers)."""
        for part in (self.u_proj, self.z_proj, self.convolution, self.x_proj, self.o_proj, *(self.norms or ())):
            part.reset_parameters()
        self.o_proj.weight /= self.num_layers**0.5
        bound = self.widths[0] ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        self.dt_bias.copy_(log_uniform_steps(self.inner))
        self.log_a.copy_(torch.arange(1, self.state_dim + 1).log().expand(self.inner, -1))
        self.d.fill_(1.0)

    def state_spec(self) -> dict[str, Any]:
        return {
            "convolution": ((self.conv_width - 1, self.inner), "input"),
            "memory": (self.inner, self.state_dim),
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        # Two products where the paper's code has one and cuts it in two: halves of a row would have to be copied.
        u, tail = self.convolution(self.u_proj(x), state["convolution"], segments)
        chosen = self.x_proj(u).split(self.widths, -1)
        if self.norms is not None:
            chosen = [norm(part) for norm, part in zip(self.norms, chosen, strict=True)]
        r, b, c = chosen
        # Faster than exp(10) nothing needs to forget; far beyond it, the gradient of Delta would overflow.
        a = -self.log_a.to(accumulation_dtype(x.dtype)).clamp(max=10).exp()
        y, memory = selective_scan(
            u,
            self.dt_proj(r),
            a,
            b,
            c,
            d=self.d,
            dt_bias=self.dt_bias,
            z=self.z_proj(x),
            negative_eigenvalues=self.negative_eigenvalues,
            state=state["memory"],
            segments=segments,
        )
        return self.o_proj(y), State(convolution=tail, memory=memory)
