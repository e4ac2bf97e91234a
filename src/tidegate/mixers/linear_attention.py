"""Linear attention: softmax's kernel replaced by a feature map, so that history is one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer
from tidegate.nn.parts import HeadNorm, check_heads, split_heads
from tidegate.ops import linear_attention
from tidegate.ops.pointwise import elu_plus_one
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": elu_plus_one,
    "relu": functional.relu,
    "softmax": lambda x: x.softmax(-1),
    "identity": lambda x: x,
}


@register(
    "linear-attention",
    family="linear_attention",
    paper="gla",
    title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arxiv="2006.16236",
    tiny=dict(num_heads=2),
)
class LinearAttention(Mixer):
    """Linear attention: phi(q) and phi(k) in place of the softmax kernel.

    Equation, per head (S is K x V, z has K entries)::

        S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)
        o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps)        y = concat_h(o) W_o

    - phi is `feature_map`: "elu+1" (the paper), "relu", "softmax" or "identity".
    - `normalise=False` drops z and puts an RMSNorm per head in its place, as later work does; needed for "identity",
      whose normaliser may be zero.
    - Nothing is ever forgotten: the memory is a sum over all history.

    Source: arXiv 2006.16236. Shapes: x, y (B, T, dim); K = V = dim / num_heads.
    State: memory (H, K, V + 1), whose last column is z; (H, K, V) without normaliser.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        feature_map: str = "elu+1",
        normalise: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.feature_map, self.normalise, self.eps = (
            dim,
            num_heads,
            feature_map,
            normalise,
            eps,
        )
        self.head_dim = check_heads(dim, num_heads)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: seen {feature_map!r}, wanted one of {', '.join(FEATURE_MAPS)}")
        if normalise and feature_map == "identity":
            raise ValueError("normalise: the identity feature map has no positive normaliser; use normalise=False")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.norm = None if normalise else HeadNorm(self.head_dim, eps=1e-5, **factory)
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)

    def state_spec(self) -> dict[str, Any]:
        return {"memory": (self.num_heads, self.head_dim, self.head_dim + self.normalise)}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv_proj(x).chunk(3, -1))
        phi = FEATURE_MAPS[self.feature_map]
        if self.normalise:
            v = functional.pad(v, (0, 1), value=1.0)  # the normaliser is the memory of a constant one
        o, memory = linear_attention(phi(q), phi(k), v, state=state["memory"], segments=segments)
        y = self.norm(o) if self.norm is not None else (o[..., :-1] / (o[..., -1:] + self.eps)).flatten(-2)
        return self.o_proj(y), State(memory=memory)
