"""Kimi delta attention: the gated delta rule with a decay for every key channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import accumulation_dtype
from tidegate.nn.parts import check_heads, l2_normalise, log_uniform_steps, split_heads
from tidegate.nn.qkv import QKVMixer
from tidegate.ops import delta_rule, gated_norm
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "kimi-delta-attention",
    family="delta",
    paper="rwkv-7",
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    arxiv="2510.26692",
    tiny=dict(num_heads=2, num_value_heads=4, head_dim=8, expand_v=1.5),
    presets={"48b": dict(num_heads=32, head_dim=128), "bounded": dict(lower_bound=-5.0)},
)
class KimiDeltaAttention(QKVMixer):
    """Kimi delta attention (KDA): Gated DeltaNet whose forgetting is as fine-grained as gated linear attention's.

    Equation, per value head (S is K x V, alpha_t scales its rows)::

        q, k = l2(silu(conv(x W))),  v = silu(conv(x W_v)),  beta = sigmoid(x W_b)
        log alpha_t = -exp(log_a) softplus(x W_1 W_2 + dt_bias)        or lower_bound sigmoid(exp(log_a) (...))
        S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
        y = (RMSNorm_head(o) * sigmoid(x W_3 W_4 + b)) W_o

    - The decay acts first, then the correction, and the order matters: diag(alpha) and k k^T do not commute.
    - W_1, W_3 lead to `gate_rank` channels, one value head's width by default; log_a has an entry per value head,
      dt_bias per key channel. `lower_bound`, as -5, takes the second form of the gate, which never decays faster.
    - K is `head_dim`, or dim / num_heads without it; V = expand_v K. `num_value_heads` (a multiple of num_heads) lets
      several value heads share a query and key head; each has its own decays.
    - `negative_eigenvalues` doubles beta (arXiv 2411.12537).
    - exp(log_a) starts uniform in [1, 16], or at 1 with the bound, softplus(dt_bias) log-uniform in [1e-3, 0.1];
      neither has weight decay.

    Source: arXiv 2510.26692. Shapes: x, y (B, T, dim).
    State: convolution (conv_width - 1, 2 H K + Hv V), memory (Hv, K, V).
    """

    always_silu = True
    no_weight_decay = ("log_a", "dt_bias")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        conv_width: int | None = 4,
        gate_rank: int | None = None,
        lower_bound: float | None = None,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_value_heads, self.head_dim = dim, num_heads, num_value_heads, head_dim
        self.expand_v, self.conv_width, self.gate_rank, self.lower_bound = expand_v, conv_width, gate_rank, lower_bound
        self.negative_eigenvalues, self.norm_eps = negative_eigenvalues, norm_eps
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"lower_bound: seen {lower_bound}, wanted a log decay below 0, or None")
        self.key_dim = head_dim or check_heads(dim, num_heads)
        self.value_dim = check_heads(self.key_dim, 1, expand_v, "expand_v")
        self.heads = num_value_heads or num_heads
        if self.heads % num_heads:
            raise ValueError(f"num_value_heads: seen {self.heads}, wanted a multiple of num_heads = {num_heads}")
        self.memory_shape = (self.heads, self.key_dim, self.value_dim)
        keys, values, rank = num_heads * self.key_dim, self.heads * self.value_dim, gate_rank or self.value_dim
        self.low_widths = (rank, rank, self.heads)  # decay, output gate, beta

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_qkv((keys, keys, values), factory)
        self.low_proj = nn.Linear(dim, sum(self.low_widths), bias=False, **factory)
        self.decay_up = nn.Linear(rank, self.heads * self.key_dim, bias=False, **factory)
        self.gate_up = nn.Linear(rank, values, **factory)
        self.log_a = nn.Parameter(torch.empty(self.heads, **factory))
        self.dt_bias = nn.Parameter(torch.empty(self.heads * self.key_dim, **factory))
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim, **factory))
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """PyTorch's defaults for the parts; the official ranges for the decay."""
        super().reset_parameters()
        rate = 1 + 15 * torch.rand(self.heads)
        self.log_a.copy_(rate.log() if self.lower_bound is None else torch.zeros_like(rate))
        self.dt_bias.copy_(log_uniform_steps(self.heads * self.key_dim))
        self.norm_weight.fill_(1.0)

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, k, v), new = self._qkv(x, state, segments)
        q, k = l2_normalise(split_heads(q, self.num_heads)), l2_normalise(split_heads(k, self.num_heads))
        if (groups := self.heads // self.num_heads) > 1:
            q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
        decay, gate, beta = self.low_proj(x).split(self.low_widths, -1)
        o, new["memory"] = delta_rule(
            q,
            k,
            split_heads(v, self.heads),
            beta.sigmoid() * (2 if self.negative_eigenvalues else 1),
            self._log_decay(self.decay_up(decay)),
            scale=self.key_dim**-0.5,
            state=state["memory"],
            segments=segments,
        )
        gate = split_heads(self.gate_up(gate), self.heads)
        y = gated_norm(o, gate, self.norm_weight, eps=self.norm_eps, activation="sigmoid")
        return self.o_proj(y.flatten(-2)), State(new)

    def _log_decay(self, logits: Tensor) -> Tensor:
        wide = accumulation_dtype(logits.dtype)  # a decay of 0.999 has no room in half precision
        logits = split_heads(logits.to(wide) + self.dt_bias.to(wide), self.heads)
        rate = self.log_a.to(wide).exp()[:, None]
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(rate * logits)
        return -rate * functional.softplus(logits)
