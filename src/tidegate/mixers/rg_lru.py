"""RG-LRU: a real, gated linear recurrent unit inside Griffin's recurrent block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import ShortConvolution, check_heads, inverse_softplus
from tidegate.ops import scan
from tidegate.ops.rg_lru import rg_lru_gates
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


@register(
    "rg-lru",
    family="scan",
    paper="rg-lru",
    title="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    arxiv="2402.19427",
    tiny=dict(lru_width=24, num_heads=2),
    presets={"recurrentgemma-2b": dict(num_heads=10)},
)
class RGLRU(Mixer):
    """Real-gated linear recurrent unit (RG-LRU), with the recurrent block of Hawk and Griffin around it.

    Equation::

        u = conv(W_x x + b_x),   branch = gelu(W_y x + b_y)
        r_t = sigmoid(A u_t + b_a),   i_t = sigmoid(I u_t + b_i)             A, I block-diagonal, num_heads blocks
        log a_t = -c r_t softplus(a_param)
        h_t = a_t * h_{t-1} + m_t * i_t * u_t,   m_t = sqrt(1 - a_t^2), but 1 for the first token of a document
        y = W_o (h * branch) + b_o

    - The first token of a document has nothing to be averaged with, hence m_t = 1. Whether a row has begun is part of
      the state (`started`), so that an empty state and a state that happens to be zero are not the same.
    - The derivative of the root is held below 1000, which it would exceed where a_t is nearly 1.
    - The gate is applied to log a_t (a power of a), and 1 - a^2 comes from expm1, both for a near 1.
    - No activation follows the convolution. GELU is the tanh form.

    Initialisation: a uniform in area on [a_min, a_max]; W_x, W_y ~ N(0, 1 / dim), W_o ~ N(0, 2 / (num_layers
    lru_width)), convolution N(0, 0.01 / conv_width), gates N(0, 1 / block width), biases zero.
    Source: arXiv 2402.19427; RecurrentGemma, 2404.07839. Shapes: x, y (B, T, dim), W = lru_width or dim.
    State: convolution (conv_width - 1, W), memory (W), started (1), an integer: 1 once there was a token.
    """

    no_weight_decay = ("a_param",)

    def __init__(
        self,
        dim: int,
        *,
        lru_width: int | None = None,
        num_heads: int = 4,
        conv_width: int = 4,
        c: float = 8.0,
        a_min: float = 0.9,
        a_max: float = 0.999,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.lru_width, self.num_heads, self.conv_width = dim, lru_width, num_heads, conv_width
        self.c, self.a_min, self.a_max, self.num_layers = c, a_min, a_max, num_layers
        if lru_width is not None and lru_width < 1:
            raise ValueError(f"lru_width: seen {lru_width}, wanted at least 1, or None for dim")
        if conv_width < 1:
            raise ValueError(f"conv_width: seen {conv_width}, wanted at least 1 (which is a gain per channel)")
        if not c > 0:
            raise ValueError(f"c: seen {c}, wanted more than 0")
        if not 0 < a_min <= a_max < 1:
            raise ValueError(f"a_min, a_max: seen {a_min} and {a_max}, wanted 0 < a_min <= a_max < 1")
        self.width = lru_width or dim
        block = check_heads(self.width, num_heads)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.xy_proj = nn.Linear(dim, 2 * self.width, **factory)  # W_x and W_y
        self.convolution = ShortConvolution(self.width, conv_width, bias=True, activation=False, **factory)
        self.gate_weight = nn.Parameter(torch.empty(num_heads, block, 2 * block, **factory))  # A and I
        self.gate_bias = nn.Parameter(torch.empty(num_heads, 2 * block, **factory))
        self.a_param = nn.Parameter(torch.empty(self.width, **factory))
        self.o_proj = nn.Linear(self.width, dim, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        uniform = torch.rand(self.width, dtype=torch.float64, device=self.a_param.device)
        log_a = 0.5 * torch.log(self.a_min**2 + uniform * (self.a_max**2 - self.a_min**2))
        self.a_param.copy_(inverse_softplus(-log_a))
        block = self.width // self.num_heads
        for weight, variance in (
            (self.xy_proj.weight, 1 / self.dim),
            (self.o_proj.weight, 2 / (self.num_layers * self.width)),
            (self.convolution.weight, 0.01 / self.conv_width),
            (self.gate_weight, 1 / block),
        ):
            nn.init.normal_(weight, std=variance**0.5)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def state_spec(self) -> dict[str, Any]:
        return {
            "convolution": ((self.conv_width - 1, self.width), "input"),
            "memory": (self.width,),
            "started": ((1,), torch.int64),
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        u, branch = self.xy_proj(x).chunk(2, -1)
        u, tail = self.convolution(u, state["convolution"], segments)
        gates = torch.einsum("bthi,hij->bthj", u.unflatten(-1, (self.num_heads, -1)), self.gate_weight) + self.gate_bias
        first, started = _first_tokens(state["started"], x, segments)
        rate = self.c * functional.softplus(self.a_param.to(accumulation_dtype(x.dtype)))
        h, memory = scan(*rg_lru_gates(u, gates, rate, first), state=state["memory"], segments=segments)
        y = self.o_proj(h.to(x.dtype) * functional.gelu(branch, approximate="tanh"))
        return zero_padding(y, segments), State(convolution=tail, memory=memory, started=started)


def _first_tokens(started: Tensor, x: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """(B, T) true on the first real token of every document, and (B, 1) 1 where a row has seen a token by now."""
    fresh = started == 0
    if segments is None:
        return fresh & (torch.arange(x.shape[1], device=x.device) == 0), torch.ones_like(started)
    count = segments.valid.cumsum(1)
    first = segments.starts | (segments.valid & (count == 1) & fresh)
    return first, torch.maximum(started, count[:, -1:].clamp(max=1))
