"""DeltaProduct: several steps of the delta rule per token, so that its transition is a product of reflections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.parts import HeadNorm, check_heads, l2_normalise, log_uniform_steps, split_heads, step_log_decay
from tidegate.nn.qkv import QKVMixer
from tidegate.ops import delta_rule
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "deltaproduct",
    family="delta",
    paper="deltaproduct",
    title="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
    arxiv="2502.10297",
    tiny=dict(num_heads=2, head_dim=8, num_value_heads=4, forget_gate=True, use_gate=True),
    presets={
        "gated": dict(forget_gate=True, use_gate=True, expand_v=2.0),
        "state-tracking": dict(conv_width=None),
    },
)
class DeltaProduct(QKVMixer):
    """DeltaProduct: every token takes `num_steps` gradient steps on recalling values from keys.

    Equation, per value head (S is K x V), for steps j = 1 .. n of token t::

        q, k_j = l2(silu(conv(x W))),  v_j = silu(conv(x W_v)),  beta_j = 2 sigmoid(x W_b)
        S_{t,0} = alpha_t S_{t-1}
        S_{t,j} = (I - beta_j k_j k_j^T) S_{t,j-1} + beta_j k_j v_j^T        S_t = S_{t,n},  o_t = S_t^T q_t / sqrt(K)
        y = RMSNorm_head(o) W_o                                              (times silu(x W_g) with `use_gate`)

    - One step is DeltaNet. Two reflections make a rotation, n of them any permutation of n + 1 things; DeltaNet's
      single one can do neither.
    - `negative_eigenvalues=False` leaves out the factor 2, and state tracking with it: every reflection needs beta
      above 1. The write doubles with it.
    - `forget_gate` adds alpha_t = exp(-exp(log_a) softplus(x W_a + dt_bias)), once per token, before the first step;
      without it alpha is 1. The preset "gated" is Gated DeltaProduct.
    - `num_value_heads` (a multiple of num_heads) lets several value heads share a query and key head. K is `head_dim`,
      or dim / num_heads; V = expand_v K. Keys, values and betas of a projection are laid out step by step.
    - exp(log_a) starts uniform in (0, 16), softplus(dt_bias) log-uniform in [1e-3, 0.1]; neither has weight decay.

    Source: arXiv 2502.10297, 2411.12537. Shapes: x, y (B, T, dim).
    State: convolution (conv_width - 1, H K + n H K + n Hv V), memory (Hv, K, V).
    """

    always_silu = True
    no_weight_decay = ("log_a", "dt_bias")

    def __init__(
        self,
        dim: int,
        *,
        num_steps: int = 2,
        num_heads: int = 4,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        conv_width: int | None = 4,
        negative_eigenvalues: bool = True,
        forget_gate: bool = False,
        use_gate: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_steps, self.num_heads, self.num_value_heads = dim, num_steps, num_heads, num_value_heads
        self.head_dim, self.expand_v, self.conv_width = head_dim, expand_v, conv_width
        self.negative_eigenvalues, self.forget_gate = negative_eigenvalues, forget_gate
        self.use_gate, self.norm_eps = use_gate, norm_eps
        if num_steps < 1:
            raise ValueError(f"num_steps: seen {num_steps}, wanted at least 1")
        self.key_dim = head_dim or check_heads(dim, num_heads)
        self.value_dim = check_heads(self.key_dim, 1, expand_v, "expand_v")
        self.heads = num_value_heads or num_heads
        if self.heads % num_heads:
            raise ValueError(f"num_value_heads: seen {self.heads}, wanted a multiple of num_heads = {num_heads}")
        self.memory_shape = (self.heads, self.key_dim, self.value_dim)
        keys, values = num_heads * self.key_dim, self.heads * self.value_dim

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_qkv((keys, num_steps * keys, num_steps * values), factory)
        self.beta_proj = nn.Linear(dim, num_steps * self.heads, bias=False, **factory)
        if forget_gate:
            self.decay_proj = nn.Linear(dim, self.heads, bias=False, **factory)
            self.log_a = nn.Parameter(torch.empty(self.heads, **factory))
            self.dt_bias = nn.Parameter(torch.empty(self.heads, **factory))
        self.gate_proj = nn.Linear(dim, values, bias=False, **factory) if use_gate else None
        self.norm = HeadNorm(self.value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """PyTorch's defaults for the parts; the paper's ranges for the decay."""
        super().reset_parameters()
        if self.forget_gate:
            self.log_a.copy_((16 * torch.rand(self.heads)).clamp(min=1e-4).log())
            self.dt_bias.copy_(log_uniform_steps(self.heads))

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, k, v), new = self._qkv(x, state, segments)
        k, v, beta = (part.unflatten(-1, (self.num_steps, -1)) for part in (k, v, self.beta_proj(x).sigmoid()))
        q, k = l2_normalise(split_heads(q, self.num_heads)), l2_normalise(split_heads(k, self.num_heads))
        if (groups := self.heads // self.num_heads) > 1:
            q, k = q.repeat_interleave(groups, -2), k.repeat_interleave(groups, -2)
        o, new["memory"] = delta_rule(
            q,
            k,
            split_heads(v, self.heads),
            beta * 2 if self.negative_eigenvalues else beta,
            self._log_decay(x) if self.forget_gate else None,
            scale=self.key_dim**-0.5,
            state=state["memory"],
            segments=segments,
        )
        y = self.norm(o, None if self.gate_proj is None else self.gate_proj(x))
        return self.o_proj(y), State(new)

    def _log_decay(self, x: Tensor) -> Tensor:
        return step_log_decay(self.decay_proj(x), self.log_a, self.dt_bias)
