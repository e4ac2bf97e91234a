"""RetNet: linear attention whose heads forget at fixed rates, from 32 tokens to thousands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer
from tidegate.nn.parts import HeadNorm, check_heads, retention_log_decay, split_heads
from tidegate.nn.rotary import rotations, token_positions
from tidegate.ops import linear_attention
from tidegate.ops.pointwise import rotate
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "retnet",
    family="linear_attention",
    paper="hybrid-linear-attention",
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    arxiv="2307.08621",
    tiny=dict(num_heads=2),
)
class RetNet(Mixer):
    """Multi-scale retention.

    Equation, per head h (S is K x V, gamma_h = 1 - 2^(-5 - h))::

        S_t = gamma_h S_{t-1} + rotary(k_t) v_t^T        o_t = S_t^T rotary(q_t) / sqrt(K)
        y = (silu(x W_g) * RMSNorm_head(o)) W_o

    - The decay is a constant of the head, not learned.
    - `rope_theta` sets the rotation of queries and keys by their position in the document (the paper's xPos without
      its length scaling); None leaves it out.
    - The paper's normalisation of the decay mask has no effect behind the norm per head and is left out.

    Source: arXiv 2307.08621. Shapes: x, y (B, T, dim); K = expand_k dim / num_heads,
    V = expand_v dim / num_heads.
    State: position (), the tokens of the document seen so far; memory (H, K, V).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_theta: float | None = 10000.0,
        use_output_gate: bool = True,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.expand_k, self.expand_v = dim, num_heads, expand_k, expand_v
        self.rope_theta, self.use_output_gate, self.norm_eps = rope_theta, use_output_gate, norm_eps
        self.key_dim = check_heads(dim, num_heads, expand_k, "expand_k")
        self.value_dim = check_heads(dim, num_heads, expand_v, "expand_v")
        if rope_theta is not None and self.key_dim % 2:
            raise ValueError(f"rope_theta: rotation needs an even number of channels per head, seen {self.key_dim}")
        values = num_heads * self.value_dim
        self.widths = (num_heads * self.key_dim, num_heads * self.key_dim, values)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=False, **factory)
        self.output_gate = nn.Linear(dim, values, bias=False, **factory) if use_output_gate else None
        self.norm = HeadNorm(self.value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections Xavier-uniform with gain 2^(-2.5), the last with gain 2^(-1), as the official code."""
        for part in (self.qkv_proj, self.output_gate):
            if part is not None:
                nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight, gain=2**-1)
        self.norm.reset_parameters()

    def state_spec(self) -> dict[str, Any]:
        return {
            "position": ((), torch.long),
            "memory": (self.num_heads, self.key_dim, self.value_dim),
        }

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv_proj(x).split(self.widths, -1))
        position, following = token_positions(x, state["position"], segments)
        if self.rope_theta is not None:
            turn = rotations(q, position, self.rope_theta)
            q, k = rotate(q, *turn), rotate(k, *turn)
        o, memory = linear_attention(
            q,
            k,
            v,
            retention_log_decay(self.num_heads, x),
            scale=self.key_dim**-0.5,
            state=state["memory"],
            segments=segments,
        )
        y = self.norm(o, None if self.output_gate is None else self.output_gate(x))
        return self.o_proj(y), State(position=following, memory=memory)
