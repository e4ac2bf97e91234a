"""Mamba-2: a state space model with one decay per head, which is decayed linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import ShortConvolution, log_uniform_steps, split_heads, token_shift
from tidegate.ops import gated_norm, linear_attention
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

RULES = ("euler", "zoh", "trapezoid")


@register(
    "mamba2",
    family="linear_attention",
    paper="mamba",
    title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    arxiv="2405.21060",
    tiny=dict(head_dim=16, state_dim=8, num_groups=2),
    presets={"130m": dict(state_dim=128, head_dim=64)},
)
class Mamba2(Mixer):
    """Mamba-2 (SSD): input, forgetting and read-out of a state space model chosen by the token.

    Equation, per head (S is N x P; B, C shared by the heads of a group)::

        z, xBC, dt = x W_in        xBC = silu(conv(xBC))        Delta = softplus(dt + dt_bias)
        S_t = exp(-Delta_t exp(log_a)) S_{t-1} + B_t (Delta_t x_t)^T        o_t = S_t^T C_t + d x_t
        y = RMSNorm(o * silu(z)) W_out

    - It is linear attention with q = C, k = B, v = Delta x and a scalar decay per head.
    - The gate comes before the norm, which runs over dim_inner / num_groups channels;
      `norm_before_gate=True` swaps them, `use_norm=False` leaves the norm out.
    - `rule` says how much of an input is written. "euler" is the above, Delta_t of it; "zoh" is the exact integral over
      a step in which the input is held, (1 - alpha_t) / exp(log_a) with alpha the decay; "trapezoid" (Mamba-3) weights
      the ends of the step, lambda_t = sigmoid(x W_l):
      S_t = alpha_t S_{t-1} + (1 - lambda_t) Delta_t alpha_t B_{t-1} x_{t-1}^T + lambda_t Delta_t B_t x_t^T.
      Those are two memories' worth of work.
    - `skip_per_channel` gives d an entry for every channel instead of every head.
    - The paper's stack has no feed-forward layer between these (`feed_forward="none"` in a LanguageModel).
    - exp(log_a) starts uniform in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1], d at 1; none has weight decay.

    Source: arXiv 2405.21060; the trapezoid 2603.15569. Shapes: x, y (B, T, dim); dim_inner = expand dim = H P;
    N = state_dim. State: convolution (conv_width - 1, dim_inner + 2 G N), memory (H, N, P), with the trapezoid also
    previous (dim_inner + G N), the last token's x and B.
    """

    no_weight_decay = ("log_a", "dt_bias", "d")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 128,
        head_dim: int = 64,
        expand: float = 2.0,
        num_groups: int = 1,
        conv_width: int = 4,
        dt_limit: tuple[float, float] | None = None,
        rule: str = "euler",
        skip_per_channel: bool = False,
        use_norm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.head_dim, self.expand, self.num_groups = (
            dim,
            state_dim,
            head_dim,
            expand,
            num_groups,
        )
        self.conv_width, self.dt_limit, self.use_norm = conv_width, dt_limit, use_norm
        self.norm_before_gate, self.norm_eps, self.num_layers = norm_before_gate, norm_eps, num_layers
        self.rule, self.skip_per_channel = rule, skip_per_channel
        self.inner = int(expand * dim)
        if self.inner != expand * dim or self.inner % head_dim:
            raise ValueError(f"head_dim: expand * dim = {expand * dim:g} is no multiple of head_dim = {head_dim}")
        self.num_heads = self.inner // head_dim
        if self.num_heads % num_groups:
            raise ValueError(f"num_groups: seen {num_groups}, wanted a divisor of the {self.num_heads} heads")
        if dt_limit is not None and not 0 <= dt_limit[0] < dt_limit[1]:
            raise ValueError(f"dt_limit: seen {dt_limit}, wanted 0 <= low < high")
        if rule not in RULES:
            raise ValueError(f"rule: seen {rule!r}, wanted one of {', '.join(RULES)}")
        grouped = num_groups * state_dim
        ends = self.num_heads if rule == "trapezoid" else 0
        self.widths = (self.inner, self.inner + 2 * grouped, self.num_heads, ends)  # z, xBC, dt, lambda
        self.xbc_widths = (self.inner, grouped, grouped)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False, **factory)
        self.convolution = ShortConvolution(self.widths[1], conv_width, bias=True, **factory)
        self.log_a = nn.Parameter(torch.empty(self.num_heads, **factory))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, **factory))
        self.d = nn.Parameter(torch.empty(self.inner if skip_per_channel else self.num_heads, **factory))
        self.norm_weight = nn.Parameter(torch.empty(self.inner, **factory)) if use_norm else None
        self.o_proj = nn.Linear(self.inner, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class docstring; the projections as PyTorch, the last divided by sqrt(num_layers)."""
        self.in_proj.reset_parameters()
        self.convolution.reset_parameters()
        self.o_proj.reset_parameters()
        with torch.no_grad():
            self.o_proj.weight /= self.num_layers**0.5
            self.log_a.copy_((1 + 15 * torch.rand(self.num_heads)).log())
            self.dt_bias.copy_(log_uniform_steps(self.num_heads))
            self.d.fill_(1.0)
            if self.norm_weight is not None:
                self.norm_weight.fill_(1.0)

    def state_spec(self) -> dict[str, Any]:
        previous = {"previous": ((sum(self.xbc_widths[:2]),), "input")} if self.rule == "trapezoid" else {}
        return {
            "convolution": ((self.conv_width - 1, self.widths[1]), "input"),
            "memory": (self.num_heads, self.state_dim, self.head_dim),
            **previous,
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        z, xbc, dt, ends = self.in_proj(x).split(self.widths, -1)
        xbc, tail = self.convolution(xbc, state["convolution"], segments)
        u, b, c = xbc.split(self.xbc_widths, -1)
        wide = accumulation_dtype(x.dtype)  # a decay of 0.999 has no room in half precision
        step = functional.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if self.dt_limit is not None:
            step = step.clamp(*self.dt_limit)
        rate = self.log_a.to(wide).exp()
        log_decay = -rate * step
        written = -torch.expm1(log_decay) / rate if self.rule == "zoh" else step
        new: dict[str, Tensor] = {}
        if self.rule == "trapezoid":
            written = torch.sigmoid(ends.to(wide)) * step
            before, new["previous"] = token_shift(xbc[..., : sum(self.xbc_widths[:2])], state["previous"], segments)
        q = self._of_groups(c)
        o, memory = self._memory(q, b, u, written, log_decay, state["memory"], segments)
        if self.rule == "trapezoid":  # a state is the sum of what its writes leave behind
            u_before, b_before = before.split(self.xbc_widths[:2], -1)
            share = (step - written) * log_decay.exp()
            o_before, from_before = self._memory(q, b_before, u_before, share, log_decay, None, segments)
            o, memory = o + o_before, memory + from_before
        skip = self.d.view(self.num_heads, -1)
        y = self._gated(torch.addcmul(o, skip, split_heads(u, self.num_heads)).flatten(-2), z)
        return self.o_proj(y), State(convolution=tail, memory=memory, **new)

    def _of_groups(self, part: Tensor) -> Tensor:
        """(B, T, G N) -> (B, T, H, N), the same for all heads of a group."""
        return split_heads(part, self.num_groups).repeat_interleave(self.num_heads // self.num_groups, 2)

    def _memory(
        self,
        q: Tensor,
        b: Tensor,
        u: Tensor,
        written: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor]:
        v = written[..., None].to(u.dtype) * split_heads(u, self.num_heads)
        return linear_attention(q, self._of_groups(b), v, log_decay, state=state, segments=segments)

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        if self.norm_weight is None:
            return y * functional.silu(gate)
        y, gate = split_heads(y, self.num_groups), split_heads(gate, self.num_groups)
        weight = self.norm_weight.view(self.num_groups, -1)
        return gated_norm(y, gate, weight, eps=self.norm_eps, norm_before_gate=self.norm_before_gate).flatten(-2)
