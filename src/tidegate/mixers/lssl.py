"""LSSL: a linear state space model for every channel, with a full matrix from HiPPO that may be trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.hippo import MEASURES, discretise_dense, rule_weight, transition
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.state_space import ChannelMap
from tidegate.ops.dense_ssm import dense_ssm
from tidegate.ops.loop import over_time
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

STRUCTURED = ("legs", "legt", "lagt")


@register(
    "lssl",
    family="scan",
    paper="lssl",
    title="Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
    arxiv="2110.13985",
    tiny=dict(state_dim=8),
    presets={
        "small": dict(state_dim=128),
        "large": dict(state_dim=256, channels=4),
        "fixed": dict(train_transition=False, train_step=False),
        "structured": dict(structured=True),
    },
)
class LSSL(Mixer):
    """Linear state space layer (LSSL).

    Equation, per channel, with N numbers h, and then at steps d = exp(log_step)::

        h' = A h + B x,      z = C h + skip * x,      y = gelu(z) W
        (1 - a d A) h_t = (1 + (1 - a) d A) h_{t-1} + d B x_t                              `rule` a, "bilinear" 1/2

    - `measure`: where A and B start, HiPPO's of that name (nn/hippo.py). One A for all channels; `per_channel` gives
      each its own. `train_transition=False` and `train_step=False` leave A and B, and d, as they start ("LSSL-f").
    - `rule` is "forward" (a = 0), "bilinear", "backward" (1), any number between, or "zoh".
    - `channels` is the number of outputs z of every channel, all of which W reads: channels meet nowhere else.
    - `structured`, for "legs", "legt" and "lagt": A = -P (D + T^-1) Q with diagonal P, D, Q and tridiagonal T, all
      trained: HiPPO's matrices and no others.
    - `step_rescale` multiplies the steps, for input sampled at another rate than in training. `gaps` (B, T) in a call
      multiplies each token's step, for input at irregular times: exact, token by token, and slow.
    - With A = -1, B = 1, a = 1 and d = exp(v), 1 / (1 + d) is sigmoid(-v): a gated unit is a step of that length.
    - Nothing keeps a trained A from growing modes; HiPPO's are far from any, under "bilinear" and "backward". "forward"
      wants steps below 2 / N.

    `transition` holds A (1 or dim, N, N), or structured (1 or dim, 6, N): P, D, Q, and T's diagonal, the one below
    (without its first number) and above (without its last).

    As S4, and each call solves one N x N system per channel in float64 besides, for the step: at dim 256 and N 64 as
    much time as 1,000 tokens.

    Initialisation: C ~ N(0, 1), skip ~ N(0, 1), steps log-uniform in [dt_min, dt_max], W as torch.nn.Linear.
    Source: arXiv 2110.13985. Shapes: x, y (B, T, dim). State: memory (dim, N).
    """

    transition: Tensor
    input_weight: Tensor
    log_step: Tensor
    no_weight_decay = ("transition", "input_weight", "log_step")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        measure: str = "legs",
        rule: str | float = "bilinear",
        channels: int = 1,
        per_channel: bool = False,
        structured: bool = False,
        train_transition: bool = True,
        train_step: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        step_rescale: float = 1.0,
        output: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.state_dim, self.measure, self.rule, self.channels = dim, state_dim, measure, rule, channels
        self.per_channel, self.structured, self.output = per_channel, structured, output
        self.train_transition, self.train_step = train_transition, train_step
        self.dt_min, self.dt_max, self.step_rescale = dt_min, dt_max, step_rescale
        if measure not in MEASURES:
            raise ValueError(f"measure: seen {measure!r}, wanted one of {', '.join(MEASURES)}")
        if structured and measure not in STRUCTURED:
            raise ValueError(f"measure: seen {measure!r}, wanted one of {', '.join(STRUCTURED)} with structured=True")
        if state_dim < 1 or (measure == "fout" and state_dim % 2):
            raise ValueError(f"state_dim: seen {state_dim}, wanted at least 1, and an even number for 'fout'")
        rule_weight(rule)  # only the check
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: seen {dt_min} and {dt_max}, wanted 0 < dt_min <= dt_max")
        if not step_rescale > 0:
            raise ValueError(f"step_rescale: seen {step_rescale}, wanted more than 0")
        systems = dim if per_channel else 1

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        held = {
            "transition": (
                torch.empty(systems, 6 if structured else state_dim, state_dim, **factory),
                train_transition,
            ),
            "input_weight": (torch.empty(systems, state_dim, **factory), train_transition),
            "log_step": (torch.empty(dim, **factory), train_step),
        }
        for name, (tensor, trained) in held.items():
            if trained:
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.output_weight = nn.Parameter(torch.empty(dim, channels, state_dim, **factory))
        self.skip = nn.Parameter(torch.empty(dim, channels, **factory))
        self.output_map = ChannelMap(dim, output, outputs=channels, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        for A, B in zip(self.transition, self.input_weight, strict=True):
            start, write = transition(self.measure, self.state_dim)
            A.copy_(self._factors() if self.structured else start)
            B.copy_(write)
        nn.init.normal_(self.output_weight)
        nn.init.normal_(self.skip)
        nn.init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))
        self.output_map.reset_parameters()

    def _factors(self) -> Tensor:
        """P, D, Q and T's diagonals (6, N), float64, of the measure's A."""
        n = torch.arange(self.state_dim, dtype=torch.float64)
        root, one = torch.sqrt(2 * n + 1), torch.ones_like(n)
        if self.measure == "legs":
            return torch.stack([root, -n / (2 * n + 1), root, one, -one, 0 * one])
        if self.measure == "lagt":
            return torch.stack([one, -one / 2, one, one, -one, 0 * one])
        corners = (n == 0).double() + (n == self.state_dim - 1)
        return torch.stack([root, 0 * one, root, corners, -one, one])

    def state_spec(self) -> dict[str, Any]:
        return {"memory": (self.dim, self.state_dim)}

    def continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (1 or dim, N, N), B (1 or dim, N) and the steps (dim), float64."""
        A, B = self.transition.double(), self.input_weight.double()
        if self.structured:
            P, D, Q, middle, below, above = A.unbind(1)
            T = torch.diag_embed(middle) + torch.diag_embed(below[:, 1:], -1) + torch.diag_embed(above[:, :-1], 1)
            A = -P[..., None] * (torch.diag_embed(D) + torch.linalg.inv(T)) * Q[:, None]
        return A, B, self.step_rescale * torch.exp(self.log_step.double())

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segments: Segments | None = None,
        gaps: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        wide, (A, B, step) = accumulation_dtype(x.dtype), self.continuous()
        if gaps is None:
            a, b = (part.to(wide) for part in discretise_dense(A, B, step, self.rule))
            z, memory = dense_ssm(x, a, b, self.output_weight, state=state["memory"], segments=segments)
        elif gaps.shape != x.shape[:2]:
            raise ValueError(f"gaps: seen shape {tuple(gaps.shape)}, wanted (batch, time) = {tuple(x.shape[:2])}")
        else:
            z, memory = self._irregular(x.to(wide), gaps.double(), A, B, step, state["memory"], segments)
        y = self.output_map(torch.addcmul(z.to(x.dtype), self.skip, x[..., None]).flatten(2))
        return zero_padding(y, segments), State(memory=memory)

    def _irregular(
        self,
        x: Tensor,
        gaps: Tensor,
        A: Tensor,
        B: Tensor,
        step: Tensor,
        memory: Tensor,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor]:
        """Every token with a step of its own; z (B, T, dim, channels)."""
        C = self.output_weight.to(x.dtype)

        def advance(carry: tuple[Tensor, ...], *now: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            (kept,), (x_t, gap, start, real) = carry, now
            a, b = (part.to(x_t.dtype) for part in discretise_dense(A, B, gap[:, None] * step, self.rule))
            before = torch.where(start[:, None, None], 0, kept)
            h = (a @ before[..., None])[..., 0] + b * x_t[..., None]
            z = torch.einsum("dmn,bdn->bdm", C, h)
            real = real[:, None, None]
            return (torch.where(real, h, kept),), torch.where(real, z, 0)

        if segments is None:
            segments = Segments.padded(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        given = (x, zero_padding(gaps, segments), segments.starts, segments.valid)
        (last,), z = over_time(advance, (memory,), given)
        return z, last
