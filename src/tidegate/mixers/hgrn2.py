"""HGRN-2: gated linear attention whose key is what the forget gate lets go of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import accumulation_dtype
from tidegate.nn.parts import RMSNorm, check_heads, split_heads
from tidegate.nn.qkv import QKVMixer
from tidegate.ops import linear_attention
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "hgrn2",
    family="linear_attention",
    paper="hybrid-linear-attention",
    title="HGRN2: Gated Linear RNNs with State Expansion",
    arxiv="2404.07904",
    tiny=dict(expand_ratio=8, num_heads=2, conv_width=4, lower_bound=0.25),
)
class HGRN2(QKVMixer):
    """HGRN-2: the first HGRN with a matrix for a state, at no further parameters.

    Equation, per head (S is K x V, gamma a bound per channel)::

        q = silu(x W_q),   i = x W_i,   lambda_t = gamma + (1 - gamma) sigmoid(x W_f)
        S_t = diag(lambda_t) S_{t-1} + (1 - lambda_t) i_t^T        o_t = S_t^T q_t / sqrt(K)
        y = RMSNorm(o) W_o                                         (over all heads together)

    - The key is 1 - lambda_t: a channel that keeps its memory does not write.
    - `lower_bound` is where gamma starts, the same for all channels; it is learned from there. By default it is
      layer_index / num_layers, the start of the paper's cumulative softmax over the layers: none in the first layer,
      the longest memory in the last. There a layer's bound depends on its neighbours' parameters; here on its own.
    - `expand_ratio` is K. Heads are as wide as that, V = K, unless `num_heads` says otherwise.
    - `conv_width` puts a short causal convolution on q, f and i, without activation.

    Source: arXiv 2404.07904, 2311.04823 (the bound). Shapes: x, y (B, T, dim); H = num_heads, V = dim / H.
    State: memory (H, K, V), with convolutions their tails too.
    """

    no_weight_decay = ("lower_bound_logit",)

    def __init__(
        self,
        dim: int,
        *,
        expand_ratio: int = 128,
        num_heads: int | None = None,
        lower_bound: float | None = None,
        conv_width: int | None = None,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.expand_ratio, self.num_heads, self.lower_bound = dim, expand_ratio, num_heads, lower_bound
        self.conv_width, self.norm_eps = conv_width, norm_eps
        self.layer_index, self.num_layers = layer_index, num_layers
        if expand_ratio < 1 or (num_heads is None and dim % expand_ratio):
            raise ValueError(f"expand_ratio: seen {expand_ratio}, wanted a divisor of dim = {dim}, or set num_heads")
        self.heads = num_heads or dim // expand_ratio
        value_dim = check_heads(dim, self.heads)
        self.bound = layer_index / num_layers if lower_bound is None else lower_bound
        if not 0 <= self.bound < 1:
            raise ValueError(f"lower_bound: seen {self.bound}, wanted at least 0 and less than 1")
        self.memory_shape = (self.heads, expand_ratio, value_dim)
        keys = self.heads * expand_ratio

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_qkv((keys, keys, dim), factory)
        if self.convolution is not None:
            self.convolution.activation = False
        self.lower_bound_logit = nn.Parameter(torch.empty(keys, **factory)) if self.bound > 0 else None
        self.norm = RMSNorm(dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's defaults; sigmoid(lower_bound_logit) at the lower bound."""
        super().reset_parameters()
        if self.lower_bound_logit is not None:
            nn.init.constant_(self.lower_bound_logit, math.log(self.bound / (1 - self.bound)))

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, f, i), new = self._qkv(x, state, segments)
        key, log_decay = self._gates(f.to(accumulation_dtype(x.dtype)))  # 0.999 has no room in half precision
        o, new["memory"] = linear_attention(
            *(split_heads(part, self.heads) for part in (functional.silu(q), key.to(q.dtype), i, log_decay)),
            scale=self.expand_ratio**-0.5,
            state=state["memory"],
            segments=segments,
        )
        return self.o_proj(self.norm(o.flatten(-2))), State(new)

    def _gates(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """1 - lambda and log lambda."""
        key = torch.sigmoid(-f)
        if self.lower_bound_logit is None:  # log lambda from `key` would be log 0 for a closed gate
            return key, functional.logsigmoid(f)
        key = key * torch.sigmoid(-self.lower_bound_logit.to(f.dtype))
        return key, torch.log1p(-key.clamp(max=1 - torch.finfo(f.dtype).eps))
