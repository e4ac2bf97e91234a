"""Softmax attention over everything so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tidegate import ops
from tidegate.nn.mixer import GROWS, Mixer
from tidegate.nn.parts import RMSNorm, split_heads
from tidegate.nn.rotary import rotations, token_positions
from tidegate.ops.pointwise import rotate
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "attention",
    family="attention",
    paper="hybrid-linear-attention",
    title="Attention Is All You Need",
    arxiv="1706.03762",
    tiny=dict(num_heads=4, num_kv_heads=2),
    exceptions={"constant_state": "every token's key and value is kept, so the state grows by one slot per token"},
)
class Attention(Mixer):
    """Causal multi-head softmax attention with rotary positions and grouped queries.

    Equation, per head, s over the document up to t::

        q, k, v = x W_q, x W_k, x W_v;   q, k <- norm(q), norm(k) if qk_norm;   q, k <- rotary(q), rotary(k)
        o_t = sum_s softmax_s(q_t . k_s / sqrt(head_dim)) v_s,   y = o W_o

    - `num_kv_heads` below `num_heads` shares each key-value head among several queries (arXiv 2305.13245).
    - Keys are cached after rotation; positions count the real tokens of a document. `rope_theta=None`: no positions.
    - W_q, W_k, W_v start normal with deviation dim^(-1/2), so that scores start with unit variance; W_o starts smaller
      by sqrt(2 num_layers), the number of branches that add up.

    Source: arXiv 1706.03762, 2104.09864. Shapes: x, y (B, T, dim).
    State: keys, values (L, num_kv_heads, head_dim), L = tokens fed; length, the tokens of the current document.
    """

    window: int | None = None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads: seen {num_heads}, wanted at least 1")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads: seen {num_heads}, wanted a divisor of dim = {dim} (or set head_dim)")
        if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
            raise ValueError(f"num_kv_heads: seen {num_kv_heads}, wanted a divisor of num_heads = {num_heads}")
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, num_kv_heads, head_dim
        self.qkv_bias, self.rope_theta, self.qk_norm, self.norm_eps = qkv_bias, rope_theta, qk_norm, norm_eps
        self.num_layers = num_layers
        self.width = head_dim or dim // num_heads  # of one head
        if self.width < 1 or (rope_theta is not None and self.width % 2):
            raise ValueError(
                f"head_dim: seen {self.width}, wanted an even number for rotary positions (or set rope_theta=None)"
            )
        if rope_theta is not None and rope_theta <= 0:
            raise ValueError(f"rope_theta: seen {rope_theta}, wanted a positive number, or None for no positions")
        self.groups = num_kv_heads or num_heads
        self.widths = (num_heads * self.width, self.groups * self.width, self.groups * self.width)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=qkv_bias, **factory)
        self.q_norm = RMSNorm(self.width, eps=norm_eps, **factory) if qk_norm else None
        self.k_norm = RMSNorm(self.width, eps=norm_eps, **factory) if qk_norm else None
        self.o_proj = nn.Linear(self.widths[0], dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class: unit-variance scores, small output."""
        nn.init.normal_(self.qkv_proj.weight, std=self.dim**-0.5)
        nn.init.normal_(self.o_proj.weight, std=(2 * self.num_layers * self.widths[0]) ** -0.5)
        if self.qkv_proj.bias is not None:
            nn.init.zeros_(self.qkv_proj.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def state_spec(self) -> Mapping[str, Any]:
        slots = ((self.window or GROWS, self.groups, self.width), "input")
        return {"keys": slots, "values": slots, "length": ((), torch.int64)}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        fresh = state is None
        x, state = self.prepare(x, state, segments)
        q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        q, k, v = split_heads(q, self.num_heads), split_heads(k, self.groups), split_heads(v, self.groups)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope_theta is not None:
            positions, _ = token_positions(x, state["length"], segments)
            turn = rotations(q, positions, self.rope_theta)
            q, k = rotate(q, *turn), rotate(k, *turn)
        # Without a past there is no mask, and the kernel can skip the upper half.
        past = None if fresh else (state["keys"], state["values"], state["length"])
        o, (keys, values, length) = ops.attention(q, k, v, window=self.window, state=past, segments=segments)
        return self.o_proj(o.flatten(-2)), State(keys=keys, values=values, length=length)
