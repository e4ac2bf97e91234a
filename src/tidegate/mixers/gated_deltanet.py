"""Gated DeltaNet: the delta rule on a memory that also fades."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.parts import HeadNorm, l2_normalise, log_uniform_steps, split_heads, step_log_decay
from tidegate.nn.qkv import QKVMixer
from tidegate.ops import delta_rule
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "gated-deltanet",
    family="delta",
    paper="hybrid-linear-attention",
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    arxiv="2412.06464",
    tiny=dict(num_heads=2, head_dim=8, expand_v=1.5),
)
class GatedDeltaNet(QKVMixer):
    """Gated DeltaNet: forget everything a little (alpha), overwrite one association (beta).

    Equation, per value head (S is K x V)::

        q, k = l2(silu(conv(x W))),  v = silu(conv(x W_v)),  beta = sigmoid(x W_b)
        log alpha = -exp(log_a) softplus(x W_a + dt_bias)
        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
        y = (RMSNorm_head(o) * silu(x W_g)) W_o

    - alpha also multiplies what is removed: the decay acts first. Decaying after the write is another model.
    - K is `head_dim`, or expand_k dim / num_heads without it; V = expand_v K. `num_value_heads` (a multiple of
      num_heads) lets several value heads share a query and key head.
    - `negative_eigenvalues` doubles beta (arXiv 2411.12537).
    - exp(log_a) starts uniform in (0, 16), softplus(dt_bias) log-uniform in [1e-3, 0.1]; neither has weight decay.

    Source: arXiv 2412.06464. Shapes: x, y (B, T, dim).
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
        expand_k: float = 0.75,
        expand_v: float = 2.0,
        conv_width: int | None = 4,
        negative_eigenvalues: bool = False,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_value_heads, self.head_dim = dim, num_heads, num_value_heads, head_dim
        self.expand_k, self.expand_v, self.conv_width = expand_k, expand_v, conv_width
        self.negative_eigenvalues, self.use_gate, self.norm_eps = negative_eigenvalues, use_gate, norm_eps
        if num_heads < 1:
            raise ValueError(f"num_heads: seen {num_heads}, wanted at least 1")
        self.heads = num_value_heads or num_heads
        if self.heads % num_heads:
            raise ValueError(f"num_value_heads: seen {self.heads}, wanted a multiple of num_heads = {num_heads}")
        key_dim = head_dim or expand_k * dim / num_heads
        value_dim = expand_v * key_dim
        if min(key_dim, value_dim) < 1 or key_dim != int(key_dim) or value_dim != int(value_dim):
            raise ValueError(
                f"head_dim, expand_k, expand_v: with dim = {dim} and num_heads = {num_heads} they give keys of "
                f"{key_dim:g} and values of {value_dim:g} channels per head; wanted whole numbers (set head_dim)"
            )
        self.key_dim, self.value_dim = int(key_dim), int(value_dim)
        keys, values = num_heads * self.key_dim, self.heads * self.value_dim
        self.memory_shape = (self.heads, self.key_dim, self.value_dim)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_qkv((keys, keys, values), factory)
        self.beta_proj = nn.Linear(dim, self.heads, bias=False, **factory)
        self.decay_proj = nn.Linear(dim, self.heads, bias=False, **factory)
        self.log_a = nn.Parameter(torch.empty(self.heads, **factory))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, **factory))
        self.gate_proj = nn.Linear(dim, values, bias=False, **factory) if use_gate else None
        self.norm = HeadNorm(self.value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's defaults for the parts; the paper's ranges for the decay."""
        super().reset_parameters()
        with torch.no_grad():
            self.log_a.copy_((16 * torch.rand(self.heads)).clamp(min=1e-4).log())
            self.dt_bias.copy_(log_uniform_steps(self.heads))

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, k, v), new = self._qkv(x, state, segments)
        q, k = l2_normalise(split_heads(q, self.num_heads)), l2_normalise(split_heads(k, self.num_heads))
        if self.heads != self.num_heads:
            q, k = (part.repeat_interleave(self.heads // self.num_heads, 2) for part in (q, k))
        beta = self.beta_proj(x).sigmoid() * (2 if self.negative_eigenvalues else 1)
        o, new["memory"] = delta_rule(
            q,
            k,
            split_heads(v, self.heads),
            beta,
            step_log_decay(self.decay_proj(x), self.log_a, self.dt_bias),
            scale=self.key_dim**-0.5,
            state=state["memory"],
            segments=segments,
        )
        y = self.norm(o, None if self.gate_proj is None else self.gate_proj(x))
        return self.o_proj(y), State(new)
