"""Gated slot attention: softmax attention over a fixed number of slots that fade and are written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import accumulation_dtype
from tidegate.nn.parts import RMSNorm, check_heads, split_heads
from tidegate.nn.qkv import QKVMixer
from tidegate.ops import linear_attention
from tidegate.ops.slot_scores import slot_scores
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "identity": lambda x: x,
}


@register(
    "gated-slot-attention",
    family="linear_attention",
    paper="mom",
    title="Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
    arxiv="2409.07146",
    tiny=dict(num_heads=4, num_kv_heads=2, num_slots=6, conv_width=4),
)
class GatedSlotAttention(QKVMixer):
    """Gated slot attention (GSA).

    Equation, per head, with M slots of a key and a value each (S is M x K, R is M x V)::

        log alpha_t = log sigmoid(x W_f) / gate_temperature
        S_t = diag(alpha_t) S_{t-1} + (1 - alpha_t) k_t^T        R_t = diag(alpha_t) R_{t-1} + (1 - alpha_t) v_t^T
        o_t = R_t^T softmax(S_t q_t)
        y = RMSNorm(silu(o)) W_o                                 (over all heads together)

    - q, k = phi(x W), v = silu(x W_v), phi being `feature_map`: "silu" (the paper), "relu" or "identity".
    - Two passes of gated linear attention with a softmax between: reading stays a convex mean of slots, and slots are
      convex means of tokens. The state is no larger than gated linear attention's with K = V = M.
    - Queries are not scaled. With x W_f = 0 a slot has a half-life of 8 tokens (`gate_temperature`).
    - `num_slots` is K by default. `num_kv_heads` < num_heads shares keys, values, gates and memories among groups of
      query heads. `conv_width` puts a short causal convolution and SiLU on q, k and v.

    Source: arXiv 2409.07146. Shapes: x, y (B, T, dim); K = expand_k dim / num_heads, V = expand_v dim / num_heads.
    State: key_slots (H, M, K), value_slots (H, M, V), with convolutions their tails too; H = num_heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        num_slots: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "silu",
        gate_temperature: float = 8.0,
        conv_width: int | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_kv_heads, self.num_slots = dim, num_heads, num_kv_heads, num_slots
        self.expand_k, self.expand_v, self.feature_map = expand_k, expand_v, feature_map
        self.gate_temperature, self.conv_width, self.norm_eps = gate_temperature, conv_width, norm_eps
        self.kv_heads = num_kv_heads or num_heads
        self.key_dim = check_heads(dim, num_heads, expand_k, "expand_k")
        self.value_dim = check_heads(dim, num_heads, expand_v, "expand_v")
        self.slots = self.key_dim if num_slots is None else num_slots
        if self.slots < 1:
            raise ValueError(f"num_slots: seen {num_slots}, wanted at least 1")
        if num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads: seen {num_kv_heads}, wanted a divisor of num_heads = {num_heads}")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: seen {feature_map!r}, wanted one of {', '.join(FEATURE_MAPS)}")

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = self.kv_heads * self.key_dim, self.kv_heads * self.value_dim
        self._build_qkv((num_heads * self.key_dim, keys, values), factory)
        self.gate_proj = nn.Linear(dim, self.kv_heads * self.slots, bias=False, **factory)
        self.norm = RMSNorm(num_heads * self.value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(num_heads * self.value_dim, dim, bias=False, **factory)

    def state_spec(self) -> dict[str, Any]:
        memories = {
            "key_slots": (self.num_heads, self.slots, self.key_dim),
            "value_slots": (self.num_heads, self.slots, self.value_dim),
        }
        if not self.conv_width:
            return memories
        return {"convolution": ((self.conv_width - 1, sum(self.widths)), "input"), **memories}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, k, v), new = self._qkv(x, state, segments)
        phi = FEATURE_MAPS[self.feature_map]
        logits = self.gate_proj(x).to(accumulation_dtype(x.dtype))  # a decay of 0.999 has no room in half precision
        log_decay = split_heads(functional.logsigmoid(logits) / self.gate_temperature, self.kv_heads)
        share = (-torch.expm1(log_decay)).to(q.dtype)
        q, k = split_heads(phi(q), self.num_heads), split_heads(phi(k), self.kv_heads)
        v = split_heads(functional.silu(v), self.kv_heads)
        if (groups := self.num_heads // self.kv_heads) > 1:
            k, v, share, log_decay = (part.repeat_interleave(groups, 2) for part in (k, v, share, log_decay))
        scores, new["key_slots"] = slot_scores(q, k, share, log_decay, state=state["key_slots"], segments=segments)
        o, new["value_slots"] = linear_attention(
            scores.softmax(-1), share, v, log_decay, state=state["value_slots"], segments=segments
        )
        return self.o_proj(self.norm(functional.silu(o.flatten(-2)))), State(new)
