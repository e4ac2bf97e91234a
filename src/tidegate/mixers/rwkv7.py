"""RWKV-7 "Goose" time mixing: a generalised delta rule with a decay and a learning rate per channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.orthogonal import orthogonal_
from tidegate.nn.parts import token_shift
from tidegate.ops import dplr
from tidegate.ops.pointwise import token_mix
from tidegate.ops.rwkv7 import rwkv7_keys, rwkv7_output
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

_MIXES = ("r", "w", "k", "v", "a", "g")  # rows of `mix`


@register(
    "rwkv7",
    family="delta",
    paper="rwkv-7",
    title="RWKV-7 Goose with Expressive Dynamic State Evolution",
    arxiv="2503.14456",
    tiny=dict(head_dim=8, decay_rank=4, a_rank=4, v_rank=4, gate_rank=4),
)
class RWKV7(Mixer):
    """RWKV-7 time mixing.

    Equation, with x^c_t = x_t + (x_{t-1} - x_t) mix_c for c in r, w, k, v, a, g, low(x) = f(x A) B, per head::

        r = x^r W_r,  k = x^k W_k,  v = x^v W_v,  g = low_sigmoid(x^g)
        w = exp(-e^(-1/2) sigmoid(decay_bias + low_tanh(x^w))),  a = sigmoid(a_bias + low(x^a))
        v <- v + (v_first - v) sigmoid(v_bias + low(x^v))                        in every layer but the first
        removed = l2(k k_k),  k <- k (1 + (a - 1) k_a)
        S_t = Diag(w_t) S_{t-1} - (a_t removed_t) (removed_t^T S_{t-1}) + k_t v_t^T        o_t = S_t^T r_t
        y = ((GroupNorm(o) + (sum_n r k bonus) v) g) W_o

    - The query is not scaled, and the norm's eps is 1e-5 head_dim.
    - `v_first`, the values of the first layer, travels in `side`, a dict shared by all layers during one call of a
      model. Without it a layer uses its own values. It is computed anew from each token and so is no state.
    - `negative_eigenvalues` doubles the removal, so that an undamped sign flip comes within reach; not in the paper's
      models, whose eigenvalues stay above -0.46.
    - At initialisation W_o and the first low-rank factors are zero, as in the authors' training code.

    Source: arXiv 2503.14456. Shapes: x, y (B, T, dim), H = dim / head_dim heads.
    State: x_prev (dim), memory (H, head_dim, head_dim).
    """

    no_weight_decay = (
        *("mix", "bonus", "decay_down", "decay_up", "a_down", "a_up"),
        *("v_down", "v_up", "gate_down", "gate_up"),
    )

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        decay_rank: int | None = None,
        a_rank: int | None = None,
        v_rank: int | None = None,
        gate_rank: int | None = None,
        negative_eigenvalues: bool = False,
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim: seen {head_dim}, wanted a divisor of dim = {dim}")
        if not 0 <= layer_index < num_layers:
            raise ValueError(f"layer_index: seen {layer_index}, wanted 0 <= layer_index < num_layers = {num_layers}")
        self.dim, self.head_dim, self.num_heads = dim, head_dim, dim // head_dim
        self.decay_rank, self.a_rank, self.v_rank, self.gate_rank = decay_rank, a_rank, v_rank, gate_rank
        self.negative_eigenvalues, self.layer_index, self.num_layers = negative_eigenvalues, layer_index, num_layers

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        def low_rank(rank: int | None, factor: float) -> tuple[nn.Parameter, nn.Parameter]:
            rank = rank or max(32, round(factor * math.sqrt(dim) / 32) * 32)
            return parameter(dim, rank), parameter(rank, dim)

        def linear() -> nn.Linear:
            return nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

        self.mix = parameter(len(_MIXES), dim)
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = linear(), linear(), linear(), linear()
        self.decay_bias, (self.decay_down, self.decay_up) = parameter(dim), low_rank(decay_rank, 2.5)
        self.a_bias, (self.a_down, self.a_up) = parameter(dim), low_rank(a_rank, 2.5)
        if layer_index > 0:
            self.v_bias, (self.v_down, self.v_up) = parameter(dim), low_rank(v_rank, 1.7)
        self.gate_down, self.gate_up = low_rank(gate_rank, 5.0)
        self.k_k, self.k_a = parameter(dim), parameter(dim)
        self.bonus = parameter(self.num_heads, head_dim)
        self.norm_weight, self.norm_bias = parameter(dim), parameter(dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' training initialisation: channels spread from short to long memory, more so in deep layers."""
        D, N = self.dim, self.head_dim
        depth = self.layer_index / max(self.num_layers - 1, 1)
        shallow = 1 - self.layer_index / self.num_layers
        i = torch.arange(D, dtype=torch.float64)
        ramp, line = i / D, i / max(D - 1, 1)
        z = (i % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
        zigzag = z * z.abs()
        powers = {"r": 0.2, "g": 0.2, "w": 0.9, "a": 0.9, "k": 0.7, "v": 0.7}
        self.mix.copy_(torch.stack([1 - ramp ** (powers[name] * shallow) for name in _MIXES]))
        self.decay_bias.copy_(-5.5 + 6 * line ** (1 + depth**0.3) + 2.5 * zigzag)
        self.a_bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5))
        self.k_k.copy_(0.71 - 0.1 * (line - 0.5))
        self.k_a.fill_(1.02)
        self.bonus.fill_(-0.04)
        pairs = [(self.decay_down, self.decay_up), (self.a_down, self.a_up), (self.gate_down, self.gate_up)]
        if self.layer_index > 0:
            self.v_bias.copy_(0.73 - 0.4 * (line - 0.5))
            pairs.append((self.v_down, self.v_up))
        for down, up in pairs:
            down.zero_()
            orthogonal_(up, gain=0.1)
        orthogonal_(self.r_proj.weight, gain=1.0)
        orthogonal_(self.k_proj.weight, gain=0.1)
        orthogonal_(self.v_proj.weight, gain=1.0)
        self.o_proj.weight.zero_()
        self.norm_weight.fill_(((1 + self.layer_index) / self.num_layers) ** 0.7)
        self.norm_bias.zero_()

    def state_spec(self):
        return {"x_prev": ((self.dim,), "input"), "memory": (self.num_heads, self.head_dim, self.head_dim)}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segments: Segments | None = None,
        side: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        wide = accumulation_dtype(x.dtype)
        shifted, x_prev = token_shift(x, state["x_prev"], segments)
        xr, xw, xk, xv, xa, xg = token_mix(x, shifted, self.mix)

        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        d = self.decay_bias + torch.tanh(xw @ self.decay_down) @ self.decay_up
        log_decay = -math.exp(-0.5) * d.to(wide).sigmoid()
        rate = self.a_bias + (xa @ self.a_down) @ self.a_up
        gate = torch.sigmoid(xg @ self.gate_down) @ self.gate_up
        v = self._value_residual(v, xv, side)

        def heads(part: Tensor) -> Tensor:
            return part.unflatten(-1, (self.num_heads, self.head_dim))

        r, k, v, rate, gate, log_decay = map(heads, (r, k, v, rate, gate, log_decay))
        k, reads, writes = rwkv7_keys(k, rate, heads(self.k_k), heads(self.k_a), rate=1 + self.negative_eigenvalues)
        o, memory = dplr(r, k, v, reads, writes, log_decay, state=state["memory"], segments=segments)
        y = rwkv7_output(o, r, k, v, gate, self.bonus, heads(self.norm_weight), heads(self.norm_bias)).flatten(-2)
        # The norm's bias speaks on padding too.
        return zero_padding(self.o_proj(y), segments), State(x_prev=x_prev, memory=memory)

    def _value_residual(self, v: Tensor, xv: Tensor, side: dict[str, Tensor] | None) -> Tensor:
        """The first layer leaves its values in `side`, later ones move towards them."""
        if side is None:
            return v
        if self.layer_index == 0 or "v_first" not in side:
            side["v_first"] = v
            return v
        return v + (side["v_first"] - v) * torch.sigmoid(self.v_bias + (xv @ self.v_down) @ self.v_up)
