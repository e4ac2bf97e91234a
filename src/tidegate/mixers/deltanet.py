"""DeltaNet: linear attention that overwrites what it stored under a key instead of adding to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.parts import HeadNorm, check_heads, l2_normalise, split_heads
from tidegate.nn.qkv import QKVMixer
from tidegate.ops import delta_rule
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "deltanet",
    family="delta",
    paper="negative-eigenvalues",
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    arxiv="2406.06484",
    tiny=dict(num_heads=2),
)
class DeltaNet(QKVMixer):
    """DeltaNet: every token is one gradient step on recalling its value from its key.

    Equation, per head (S is K x V)::

        q, k = l2(silu(conv(x W))),  v = silu(conv(x W_v)),  beta = sigmoid(x W_b)
        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
        y = RMSNorm_head(o) W_o                                        (times silu(x W_g) with `use_gate`)

    - `negative_eigenvalues` doubles beta, so that the transition's eigenvalue along k lies in [-1, 1] instead of
      [0, 1]; parity and other state tracking need it (arXiv 2411.12537). The write doubles with it.
    - `conv_width=None` leaves out the short convolutions; SiLU stays.

    Source: arXiv 2406.06484. Shapes: x, y (B, T, dim); K = expand_k dim / num_heads, V = expand_v dim / num_heads.
    State: convolution (conv_width - 1, 2 H K + H V), memory (H, K, V).
    """

    always_silu = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_width: int | None = 4,
        negative_eigenvalues: bool = False,
        use_gate: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.expand_k, self.expand_v = dim, num_heads, expand_k, expand_v
        self.conv_width, self.negative_eigenvalues = conv_width, negative_eigenvalues
        self.use_gate, self.norm_eps = use_gate, norm_eps
        self.key_dim = check_heads(dim, num_heads, expand_k, "expand_k")
        self.value_dim = check_heads(dim, num_heads, expand_v, "expand_v")
        keys, values = num_heads * self.key_dim, num_heads * self.value_dim
        self.memory_shape = (num_heads, self.key_dim, self.value_dim)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_qkv((keys, keys, values), factory)
        self.beta_proj = nn.Linear(dim, num_heads, bias=False, **factory)
        self.gate_proj = nn.Linear(dim, values, bias=False, **factory) if use_gate else None
        self.norm = HeadNorm(self.value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        qkv, new = self._qkv(x, state, segments)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv)
        beta = self.beta_proj(x).sigmoid() * (2 if self.negative_eigenvalues else 1)
        o, new["memory"] = delta_rule(
            l2_normalise(q),
            l2_normalise(k),
            v,
            beta,
            scale=self.key_dim**-0.5,
            state=state["memory"],
            segments=segments,
        )
        y = self.norm(o, None if self.gate_proj is None else self.gate_proj(x))
        return self.o_proj(y), State(new)
