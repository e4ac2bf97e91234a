"""Gated linear attention: every key channel of the memory fades at its own, input-dependent rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.feature_maps import FeatureMap
from tidegate.nn.parts import HeadNorm, check_heads, retention_log_decay, split_heads
from tidegate.nn.qkv import QKVMixer
from tidegate.ops import linear_attention
from tidegate.ops.gated_norm import ACTIVATIONS
from tidegate.ops.pointwise import log_sigmoid
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

FEATURE_MAPS = (
    "identity",
    "relu",
    "elu+1",
    "softmax",
)  # those with as many features as channels: gates are per channel


@register(
    "gla",
    family="linear_attention",
    paper="gla",
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    arxiv="2312.06635",
    tiny=dict(num_heads=2, conv_width=4),
    presets={
        "340m": dict(num_heads=4),
        "scalar-gate": dict(gate="scalar"),
        "retention-gate": dict(gate="fixed"),
        "no-gate": dict(gate="none"),
    },
)
class GatedLinearAttention(QKVMixer):
    """Gated linear attention (GLA).

    Equation, per head (S is K x V, alpha_t scales its rows)::

        alpha_t = sigmoid(x_t W_1 W_2 + b)^(1 / gate_temperature)
        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
        y = (silu(x W_r) * RMSNorm_head(o)) W_o

    - No positions, no normaliser, no feature map; the norm's weight (V) is shared by all heads.
    - `gate`: "key" (the paper), "scalar" one per head, "fixed" RetNet's constants, "none". The paper's ablation.
    - `num_kv_heads` < num_heads shares keys, values and gates among groups of query heads.
    - `conv_width` puts a short causal convolution and SiLU on q, k and v (off in the paper, on in most later work;
      it is what lets a small model bind a value to the key before it).
    - With b = 0 a channel starts with a half-life of 16 tokens; `gate_bias` moves that. `min_log_decay`, as -5, keeps
      log alpha from falling below.
    - `feature_map` on q and k: "identity" (the paper), "relu", "elu+1" or "softmax". `gate_activation`: "silu" (the
      paper) or "sigmoid" for the output gate.

    Initialisation (official code): Linear N(0, 0.02), then W_q, W_k, W_1, W_2 Xavier-uniform with gain 2^(-2.5).
    Source: arXiv 2312.06635. Shapes: x, y (B, T, dim); K = expand_k dim / num_heads, V = expand_v dim / num_heads.
    State: memory (H, K, V), with convolutions their tails too.
    """

    no_weight_decay = ("gate_bias_parameter",)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate: str = "key",
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        gate_bias: float = 0.0,
        min_log_decay: float | None = None,
        feature_map: str = "identity",
        use_output_gate: bool = True,
        gate_activation: str = "silu",
        conv_width: int | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.expand_k, self.expand_v, self.gate, self.gate_rank = expand_k, expand_v, gate, gate_rank
        self.gate_temperature, self.gate_bias, self.use_output_gate = gate_temperature, gate_bias, use_output_gate
        self.min_log_decay, self.feature_map, self.gate_activation = min_log_decay, feature_map, gate_activation
        self.conv_width, self.norm_eps = conv_width, norm_eps
        self.kv_heads = num_kv_heads or num_heads
        self.key_dim = check_heads(dim, num_heads, expand_k, "expand_k")
        self.value_dim = check_heads(dim, num_heads, expand_v, "expand_v")
        if num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads: seen {num_kv_heads}, wanted a divisor of num_heads = {num_heads}")
        if gate not in ("key", "scalar", "fixed", "none"):
            raise ValueError(f"gate: seen {gate!r}, wanted 'key', 'scalar', 'fixed' or 'none'")
        if min_log_decay is not None and not min_log_decay < 0:
            raise ValueError(f"min_log_decay: seen {min_log_decay}, wanted less than 0, or None for no limit")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: seen {feature_map!r}, wanted one of {', '.join(FEATURE_MAPS)}")
        if gate_activation not in ACTIVATIONS:
            raise ValueError(f"gate_activation: seen {gate_activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        self.memory_shape = (num_heads, self.key_dim, self.value_dim)
        widths = (num_heads * self.key_dim, self.kv_heads * self.key_dim, self.kv_heads * self.value_dim)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_qkv(widths, factory)
        self.phi = FeatureMap(feature_map, num_heads, self.key_dim)  # one without weights
        if gate in ("key", "scalar"):
            gates = widths[1] if gate == "key" else self.kv_heads
            self.gate_down = nn.Linear(dim, gate_rank, bias=False, **factory)
            self.gate_up = nn.Linear(gate_rank, gates, bias=False, **factory)
            self.gate_bias_parameter = nn.Parameter(torch.empty(gates, **factory))
        values = num_heads * self.value_dim
        self.output_gate = nn.Linear(dim, values, bias=False, **factory) if use_output_gate else None
        self.norm = HeadNorm(self.value_dim, eps=norm_eps, **factory)
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class docstring; `gate_bias` is the gate's starting bias."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
        queries_and_keys = self.qkv_proj.weight[: sum(self.widths[:2])]
        xavier = [*queries_and_keys.split(self.widths[:2])]
        if self.gate in ("key", "scalar"):
            nn.init.constant_(self.gate_bias_parameter, self.gate_bias)
            xavier += [self.gate_down.weight, self.gate_up.weight]
        with torch.no_grad():
            for weight in xavier:
                nn.init.xavier_uniform_(weight, gain=2**-2.5)
        self.norm.reset_parameters()
        if self.convolution is not None:
            self.convolution.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, k, v), new = self._qkv(x, state, segments)
        q, k, v = split_heads(q, self.num_heads), split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)
        q, k, log_decay = self.phi(q), self.phi(k), self._log_decay(x)
        if (groups := self.num_heads // self.kv_heads) > 1:
            k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
            if self.gate in ("key", "scalar"):
                log_decay = log_decay.repeat_interleave(groups, 2)  # type: ignore[union-attr]
        scale = self.key_dim**-0.5
        o, new["memory"] = linear_attention(q, k, v, log_decay, scale=scale, state=state["memory"], segments=segments)
        y = self.norm(o, None if self.output_gate is None else self.output_gate(x), self.gate_activation)
        return self.o_proj(y), State(new)

    def _log_decay(self, x: Tensor) -> Tensor | None:
        if self.gate == "none":
            return None
        if self.gate == "fixed":
            return retention_log_decay(self.num_heads, x)
        logits = self.gate_up(self.gate_down(x))
        log_decay = log_sigmoid(logits, self.gate_bias_parameter, 1 / self.gate_temperature)
        if self.min_log_decay is not None:
            log_decay = log_decay.clamp(min=self.min_log_decay)
        return log_decay if self.gate == "scalar" else split_heads(log_decay, self.kv_heads)
