"""LightNet: linear attention whose memory is a weighted mean of all history, because its decay is additive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import accumulation_dtype
from tidegate.nn.parts import check_heads, split_heads
from tidegate.nn.qkv import QKVMixer
from tidegate.nn.rotary import rotations, token_positions
from tidegate.ops import gated_norm, linear_attention
from tidegate.ops.additive_decay import additive_decay
from tidegate.ops.pointwise import rotate
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "lightnet",
    family="linear_attention",
    paper="lightnet",
    title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    arxiv="2405.21022",
    tiny=dict(expand_ratio=8, num_heads=2, gate_rank=4, conv_width=4, position="cosine"),
    presets={"rotary": dict(position="rotary"), "scalar": dict(decay="scalar"), "sigmoid-gate": dict(gate="sigmoid")},
)
class LightNet(QKVMixer):
    """LightNet attention over a sequence.

    Equation, per head (S is K x V), z the running logsumexp of the key logits e = x W_k::

        q = silu(x W_q),   z_t = log(exp z_{t-1} + exp e_t),   k_t = exp(e_t - z_t)
        S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
        y = (RMSNorm(o) * silu(x W_1 W_2)) W_o                    (the norm over all heads together)

    - Row c of S is the mean of all values so far with weights exp(e_c): a softmax over time. No row decays by itself;
      as t grows the mean moves less and less. Only differences of e count.
    - Without `position` the memory does not know the order of what it holds. "rotary" turns q and k by their position;
      "cosine" is the paper's LRPE, cosines beside sines, which doubles K. Neither is the paper's Toeplitz encoding,
      which stands before the first layer.
    - `decay="scalar"` has one logit per head in place of one per channel; keys are silu(x W_k) times its share.
    - `gate` is the output gate's activation, "silu" or "sigmoid"; `conv_width` puts a short causal convolution on q, k
      and v, without activation. `expand_ratio` is K; heads are as wide, unless `num_heads` says otherwise.

    Source: arXiv 2405.21022. Shapes: x, y (B, T, dim); V = dim / H.
    State: position (), the tokens of the document seen so far; log_weight (H, K) or (H, 1), z; memory (H, K, V), or
    (H, 2 K, V) with "cosine"; with convolutions their tails too.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand_ratio: int = 128,
        num_heads: int | None = None,
        decay: str = "key",
        position: str | None = None,
        rope_theta: float = 10000.0,
        gate: str = "silu",
        gate_rank: int = 128,
        conv_width: int | None = None,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.expand_ratio, self.num_heads, self.decay = dim, expand_ratio, num_heads, decay
        self.position, self.rope_theta, self.gate, self.gate_rank = position, rope_theta, gate, gate_rank
        self.conv_width, self.norm_eps = conv_width, norm_eps
        if expand_ratio < 1 or (num_heads is None and dim % expand_ratio):
            raise ValueError(f"expand_ratio: seen {expand_ratio}, wanted a divisor of dim = {dim}, or set num_heads")
        self.heads = num_heads or dim // expand_ratio
        value_dim = check_heads(dim, self.heads)
        if decay not in ("key", "scalar"):
            raise ValueError(f"decay: seen {decay!r}, wanted 'key' or 'scalar'")
        if position not in (None, "rotary", "cosine"):
            raise ValueError(f"position: seen {position!r}, wanted None, 'rotary' or 'cosine'")
        if position == "rotary" and expand_ratio % 2:
            raise ValueError(f"position: rotation needs an even expand_ratio, seen {expand_ratio}")
        if gate not in ("silu", "sigmoid"):
            raise ValueError(f"gate: seen {gate!r}, wanted 'silu' or 'sigmoid'")
        self.memory_shape = (self.heads, expand_ratio * (2 if position == "cosine" else 1), value_dim)
        keys = self.heads * expand_ratio

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._build_qkv((keys, keys, dim), factory)
        if self.convolution is not None:
            self.convolution.activation = False
        self.weight_proj = nn.Linear(dim, self.heads, bias=False, **factory) if decay == "scalar" else None
        self.gate_down = nn.Linear(dim, gate_rank, bias=False, **factory)
        self.gate_up = nn.Linear(gate_rank, dim, bias=False, **factory)
        self.norm_weight = nn.Parameter(torch.ones(dim, **factory))
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        """PyTorch's defaults for every part."""
        super().reset_parameters()
        nn.init.ones_(self.norm_weight)

    def state_spec(self) -> dict[str, Any]:
        logits = self.expand_ratio if self.decay == "key" else 1
        own = {"position": ((), torch.long), "log_weight": (self.heads, logits)}
        return {**own, **super().state_spec()}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        (q, k, v), tail = self._qkv(x, state, segments)
        q, v = split_heads(functional.silu(q), self.heads), split_heads(v, self.heads)
        positions, following = token_positions(x, state["position"], segments)

        # Before a document's first token its past weighs nothing, which has no finite logarithm to keep as a state.
        before = torch.where(state["position"][:, None] == 0, -torch.inf, state["log_weight"].flatten(1))
        logits = (k if self.weight_proj is None else self.weight_proj(x)).to(accumulation_dtype(x.dtype))
        share, log_decay, last = additive_decay(logits, state=before, segments=segments)
        last = torch.where(following[:, None] == 0, 0, last).view_as(state["log_weight"])
        share, log_decay = split_heads(share.to(q.dtype), self.heads), split_heads(log_decay, self.heads)
        k = share if self.weight_proj is None else share * split_heads(functional.silu(k), self.heads)
        log_decay = log_decay if self.weight_proj is None else log_decay.squeeze(-1)

        if self.position is not None:
            if self.position == "cosine":  # (x cos, x sin) is (x, 0), turned
                q, k = (functional.pad(part, (0, self.expand_ratio)) for part in (q, k))
                log_decay = log_decay if log_decay.ndim == 3 else torch.cat([log_decay, log_decay], -1)
            turn = rotations(q, positions, self.rope_theta)
            q, k = rotate(q, *turn), rotate(k, *turn)
        scale = self.expand_ratio**-0.5
        o, memory = linear_attention(q, k, v, log_decay, scale=scale, state=state["memory"], segments=segments)
        gate = self.gate_up(self.gate_down(x))
        y = gated_norm(o.flatten(-2), gate, self.norm_weight, eps=self.norm_eps, activation=self.gate)
        return self.o_proj(y), State({"position": following, "log_weight": last, **tail, "memory": memory})
