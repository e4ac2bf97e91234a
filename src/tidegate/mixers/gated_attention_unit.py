"""Gated attention unit: one head of attention whose output is gated, in place of attention and feed-forward part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate import ops
from tidegate.nn.mixer import GROWS, Mixer
from tidegate.nn.rotary import rotations, token_positions
from tidegate.ops.attention.weights import KERNELS
from tidegate.ops.pointwise import rotate
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
}
POSITIONS = ("rotary", "offset", "none")


@register(
    "gated-attention-unit",
    family="attention",
    paper="seqboat",
    title="Transformer Quality in Linear Time",
    arxiv="2202.10447",
    tiny=dict(key_dim=16, expand=1.5),
    presets={name: dict(kernel=name) for name in ("softmax", "laplace")},
    exceptions={"constant_state": "without a window every token's key and value is kept, one slot for each"},
)
class GatedAttentionUnit(Mixer):
    """Gated attention unit (GAU).

    Equation, z of Z and r, v of E channels, s over the document up to t, or over its last `window` tokens::

        z, r, v = act(x W + b)
        q = z * scale_q + bias_q,   k = z * scale_k + bias_k;   q, k <- rotary(q), rotary(k)
        o_t = sum_s f(q_t . k_s / n) v_s,   y = (r * o) W_o + b_o

    - One head; queries and keys are the same projection, scaled and moved per channel. The gate r lets one head do
      the work of many, and of the feed-forward part: two units stand for one layer of a transformer.
    - `kernel` f: "relu2" max(s, 0)^2 (the paper), "laplace" (Mega), both with n the tokens in sight, which for a window
      is its length; "softmax" over all s, with sqrt(Z) for n.
    - `positions`: "rotary" turns q and k, and keys are cached after that; "offset" adds a learned number for each
      distance within the window to the score; "none".
    - `window` counts the token itself. Without one the state grows.
    - `activation`: "silu", "gelu" or "relu".

    Initialisation (official code): weights and scales N(0, 0.02), cut off at two deviations, biases 0.
    Source: arXiv 2202.10447. Shapes: x, y (B, T, dim); Z = key_dim, E = expand dim.
    State: keys (L, 1, Z), values (L, 1, E), L = tokens fed, or window; length, the tokens of the current document.
    """

    no_weight_decay = ("qk_scale", "qk_bias")

    def __init__(
        self,
        dim: int,
        *,
        key_dim: int = 128,
        expand: float = 2.0,
        window: int | None = None,
        kernel: str = "relu2",
        positions: str = "rotary",
        activation: str = "silu",
        rope_theta: float = 10000.0,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.key_dim, self.expand, self.window, self.kernel = dim, key_dim, expand, window, kernel
        self.positions, self.activation, self.rope_theta, self.init_std = positions, activation, rope_theta, init_std
        self.width = round(expand * dim)  # E
        if key_dim < 1 or (positions == "rotary" and key_dim % 2):
            raise ValueError(f"key_dim: seen {key_dim}, wanted an even number for rotary positions (or another kind)")
        if self.width < 1 or self.width != expand * dim:
            raise ValueError(f"expand: {expand:g} * dim = {expand * dim:g} channels, wanted a whole number")
        if window is not None and window < 1:
            raise ValueError(f"window: seen {window}, wanted at least 1 (a token sees itself), or None")
        if kernel not in KERNELS:
            raise ValueError(f"kernel: seen {kernel!r}, wanted one of {', '.join(KERNELS)}")
        if positions not in POSITIONS:
            raise ValueError(f"positions: seen {positions!r}, wanted one of {', '.join(POSITIONS)}")
        if positions == "offset" and window is None:
            raise ValueError("positions: 'offset' has a number for each distance in the window; set a window")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: seen {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        if rope_theta <= 0:
            raise ValueError(f"rope_theta: seen {rope_theta}, wanted a positive number")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, key_dim + 2 * self.width, **factory)
        self.qk_scale = nn.Parameter(torch.empty(2, key_dim, **factory))
        self.qk_bias = nn.Parameter(torch.empty(2, key_dim, **factory))
        self.offset_bias = nn.Parameter(torch.empty(window or 1, **factory)) if positions == "offset" else None
        self.o_proj = nn.Linear(self.width, dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class docstring."""
        for weight in (self.in_proj.weight, self.qk_scale, self.o_proj.weight, self.offset_bias):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std)
        for bias in (self.in_proj.bias, self.qk_bias, self.o_proj.bias):
            nn.init.zeros_(bias)

    def state_spec(self) -> Mapping[str, Any]:
        slots = self.window or GROWS
        return {
            "keys": ((slots, 1, self.key_dim), "input"),
            "values": ((slots, 1, self.width), "input"),
            "length": ((), torch.int64),
        }

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segments: Segments | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """`positions` (B, T), for rotary ones: of the tokens in their documents, where x is but a part of them."""
        fresh = state is None
        x, state = self.prepare(x, state, segments)
        z, r, v = ACTIVATIONS[self.activation](self.in_proj(x)).split([self.key_dim, self.width, self.width], -1)
        q, k = torch.addcmul(self.qk_bias, z.unsqueeze(-2), self.qk_scale).split(1, -2)  # (B, T, 1, Z)
        if self.positions == "rotary":
            if positions is None:
                positions, _ = token_positions(x, state["length"], segments)
            turn = rotations(q, positions, self.rope_theta)
            q, k = rotate(q, *turn), rotate(k, *turn)
        past = None if fresh else (state["keys"], state["values"], state["length"])
        o, (keys, values, length) = ops.attention(
            q,
            k,
            v.unsqueeze(-2),
            window=self.window,
            kernel=self.kernel,
            bias=None if self.offset_bias is None else self.offset_bias[None],
            state=past,
            segments=segments,
        )
        y = self.o_proj(r * o.squeeze(-2))
        return zero_padding(y, segments), State(keys=keys, values=values, length=length)
