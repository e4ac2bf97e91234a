"""Linear attention: softmax's kernel replaced by a feature map, so that history is one matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.feature_maps import FeatureMap
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import HeadNorm, check_heads, split_heads
from tidegate.ops import linear_attention
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

LEARNED = ("exp", "softplus", "sigmoid")
NORMALISERS = ("sum", *LEARNED, "none")
_FAR = 30.0  # from where an eta is as good as zero or infinite, and no longer moves


@register(
    "linear-attention",
    family="linear_attention",
    paper="gla",
    title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arxiv="2006.16236",
    tiny=dict(num_heads=2),
    presets={
        "norm-attention": dict(feature_map="identity", normaliser="exp"),
        "based": dict(feature_map="taylor", key_dim=16),
        "unnormalised": dict(feature_map="identity", normaliser="none"),
    },
)
class LinearAttention(Mixer):
    """Linear attention: phi(q) and phi(k) in place of the softmax kernel.

    Equation, per head (S is N x V, z has N entries, N the features of phi)::

        S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)
        o_t = scale S_t^T phi(q_t) / eta_t        y = concat_h(o) W_o

        sum:                     eta_t = z_t . phi(q_t) + eps
        exp, softplus, sigmoid:  eta_t = f(W_eta x_t + b), a number per head; z is not needed
        none:                    eta_t = 1, and an RMSNorm per head

    - phi is `feature_map`, see `tidegate.nn.feature_maps`: "elu+1" (the paper), "relu", "softmax", "identity",
      "taylor" (Based), "dpfp" or "hedgehog".
    - `normaliser` "sum" makes o a mean of values; it needs features that are not negative, so not "identity". A learned
      one is that of norm attention (arXiv 2405.15731), which takes "identity". "none" is what later work does.
    - Norm attention learns badly from the plain start of its code. Here, `scale` is by default 1 / (4 sqrt N) for a
      learned normaliser (1 for the others), and the weights of W_eta start smaller by `eta_gain`, so that o starts near
      the size of v. `scale=1.0, eta_gain=1.0` is the plain start.
    - `key_dim` is K, the width of q and k of a head; V / K times less state, or more.
    - Nothing is ever forgotten: the memory is a sum over all history.

    Source: arXiv 2006.16236, 2405.15731. Shapes: x, y (B, T, dim); V = dim / num_heads, K = V by default.
    State: memory (H, N, V), with "sum" (H, N, V + 1), whose last column is z.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        key_dim: int | None = None,
        feature_map: str = "elu+1",
        normaliser: str = "sum",
        scale: float | None = None,
        eta_gain: float = 0.1,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.key_dim, self.feature_map = dim, num_heads, key_dim, feature_map
        self.normaliser, self.scale, self.eta_gain, self.eps = normaliser, scale, eta_gain, eps
        self.head_dim = check_heads(dim, num_heads)
        if key_dim is not None and key_dim < 1:
            raise ValueError(f"key_dim: seen {key_dim}, wanted at least 1, or None for dim / num_heads")
        if normaliser not in NORMALISERS:
            raise ValueError(f"normaliser: seen {normaliser!r}, wanted one of {', '.join(NORMALISERS)}")
        if normaliser == "sum" and feature_map == "identity":
            raise ValueError("normaliser: with the identity feature map the sum may be zero; use 'none' or 'exp'")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = key_dim or self.head_dim
        self.q_map = FeatureMap(feature_map, num_heads, width, **factory)
        self.k_map = FeatureMap(feature_map, num_heads, width, **factory)
        self.widths = (num_heads * width, num_heads * width, dim)
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=False, **factory)
        self.eta_proj = nn.Linear(dim, num_heads, **factory) if normaliser in LEARNED else None
        self.norm = HeadNorm(self.head_dim, eps=1e-5, **factory) if normaliser == "none" else None
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)
        self._shrink_eta()

    def reset_parameters(self) -> None:
        """Every part as it initialises itself, and W_eta and b smaller."""
        super().reset_parameters()
        self._shrink_eta()

    @torch.no_grad()
    def _shrink_eta(self) -> None:
        if self.eta_proj is not None:
            self.eta_proj.weight.mul_(self.eta_gain)
            self.eta_proj.bias.mul_(self.eta_gain)

    def state_spec(self) -> dict[str, Any]:
        return {"memory": (self.num_heads, self.q_map.features, self.head_dim + (self.normaliser == "sum"))}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv_proj(x).split(self.widths, -1))
        q, k, scale = self.q_map(q), self.k_map(k), self.scale
        if self.eta_proj is not None:
            q = q * self._inverse_eta(x).to(q.dtype)[..., None]
            scale = 0.25 * self.q_map.features**-0.5 if scale is None else scale
        o, memory = linear_attention(
            q,
            k,
            v,
            scale=scale,
            state=state["memory"],
            segments=segments,
            normaliser_eps=self.eps if self.normaliser == "sum" else None,
        )
        return self.o_proj(o.flatten(-2) if self.norm is None else self.norm(o)), State(memory=memory)

    def _inverse_eta(self, x: Tensor) -> Tensor:
        """1 / eta (B, T, H): what the query is multiplied by, which is what the output is divided by."""
        assert self.eta_proj is not None
        logits = self.eta_proj(x).to(accumulation_dtype(x.dtype)).clamp(-_FAR, _FAR)
        if self.normaliser == "softplus":
            return 1 / functional.softplus(logits)
        return torch.exp(-logits) + (self.normaliser == "sigmoid")
