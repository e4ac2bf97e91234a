"""TransNormer: linear attention with fixed decays and no scaling, the model behind Lightning attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import check_heads, split_heads
from tidegate.nn.rotary import rotations, token_positions
from tidegate.ops import gated_norm, linear_attention
from tidegate.ops.pointwise import rotate
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State


@register(
    "transnormer",
    family="linear_attention",
    paper="hybrid-linear-attention",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    arxiv="2405.17381",
    tiny=dict(num_heads=2, gate_rank=4),
    presets={"lightning": dict(rope_theta=None), "fla": dict(slopes="linear", rope_theta=None)},
)
class TransNormer(Mixer):
    """TransNormerLLM's attention, known by its kernel as Lightning attention.

    Equation, per head h (S is K x K)::

        q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)
        S_t = exp(-slope_h) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t
        y = (norm(o) * sigmoid(x W_1 W_2)) W_o         (the norm over all heads together)

    - `slopes` are constants: "geometric", 2^(-8 (h + 1) / H) times 1 - layer_index / (num_layers - 1) + 1e-5, the
      authors' (ALiBi's, so that the last layer hardly forgets); "linear", (8 h / H)(1 - layer_index / num_layers), of
      the flash-linear-attention library, whose first head never forgets. They are different models.
    - Queries are not scaled. `norm` is "rms" without weights, as in the papers, or "layer", as in the authors' example.
    - `rope_theta` turns queries and keys by their position, in the first layer only; None leaves it out.

    Source: arXiv 2405.17381, 2307.14995 (TransNormerLLM). Shapes: x, y (B, T, dim); K = dim / num_heads.
    State: memory (H, K, K), with rotation also position (), the tokens of the document seen so far.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        slopes: str = "geometric",
        rope_theta: float | None = 10000.0,
        gate_rank: int | None = None,
        norm: str = "rms",
        norm_eps: float = 1e-6,
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.slopes, self.rope_theta = dim, num_heads, slopes, rope_theta
        self.gate_rank, self.norm, self.norm_eps = gate_rank, norm, norm_eps
        self.layer_index, self.num_layers = layer_index, num_layers
        self.head_dim = check_heads(dim, num_heads)
        if slopes not in ("geometric", "linear"):
            raise ValueError(f"slopes: seen {slopes!r}, wanted 'geometric' or 'linear'")
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm: seen {norm!r}, wanted 'rms' or 'layer'")
        if not 0 <= layer_index < num_layers:
            raise ValueError(f"layer_index: seen {layer_index}, wanted 0 <= layer_index < num_layers = {num_layers}")
        self.rotates = rope_theta is not None and layer_index == 0
        if self.rotates and self.head_dim % 2:
            raise ValueError(f"rope_theta: rotation needs an even number of channels per head, seen {self.head_dim}")
        rank = gate_rank or self.head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.gate_down = nn.Linear(dim, rank, bias=False, **factory)
        self.gate_up = nn.Linear(rank, dim, bias=False, **factory)
        self.layer_norm = nn.LayerNorm(dim, eps=norm_eps, **factory) if norm == "layer" else None
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)

    def state_spec(self) -> dict[str, Any]:
        position = {"position": ((), torch.long)} if self.rotates else {}
        return {**position, "memory": (self.num_heads, self.head_dim, self.head_dim)}

    def log_decay(self) -> list[float]:
        """-slope of each head."""
        heads, place = self.num_heads, self.layer_index
        if self.slopes == "linear":
            return [-8 * h / heads * (1 - place / self.num_layers) for h in range(heads)]
        fades = 1 - place / max(self.num_layers - 1, 1) + 1e-5
        return [-slope * fades for slope in geometric_slopes(heads)]

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        q, k, v = (split_heads(part, self.num_heads) for part in functional.silu(self.qkv_proj(x)).chunk(3, -1))
        new: dict[str, Tensor] = {}
        if self.rotates:
            position, new["position"] = token_positions(x, state["position"], segments)
            turn = rotations(q, position, self.rope_theta)  # type: ignore[arg-type]
            q, k = rotate(q, *turn), rotate(k, *turn)
        log_decay = torch.tensor(self.log_decay(), device=x.device, dtype=accumulation_dtype(x.dtype))
        o, new["memory"] = linear_attention(q, k, v, log_decay, state=state["memory"], segments=segments)
        o, gate = o.flatten(-2), self.gate_up(self.gate_down(x))
        if self.layer_norm is not None:  # its bias is silent on padding only behind the mask
            y = self.layer_norm(o) * torch.sigmoid(gate)
            y = y if segments is None else segments.zero_padding(y)
        else:
            y = gated_norm(o, gate, eps=self.norm_eps, activation="sigmoid")
        return self.o_proj(y), State(new)


def geometric_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes (arXiv 2108.12409): 2^(-8 (h + 1) / H) for a power of two.

    For other numbers of heads those of the largest power of two below, then every second one of twice as many heads.

    >>> geometric_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + (geometric_slopes(2 * power)[::2][: num_heads - power] if num_heads > power else [])
