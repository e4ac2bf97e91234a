"""RWKV-6 "Finch" time mixing: linear attention that reads before it writes, every gate seeing the token before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.orthogonal import orthogonal_
from tidegate.nn.parts import split_heads, token_shift
from tidegate.ops import linear_attention
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

_VIEWS = ("w", "k", "v", "r", "g")  # rows of `mix`
_WEAKEST = 5.0  # exp(-exp(5)) is zero beside anything; exp of a larger number would soon be infinite
_SMALL = 2.0**-20  # outputs are made smaller by this before their norm, and its eps with them: squares stay finite


@register(
    "rwkv6",
    family="linear_attention",
    paper="hybrid-linear-attention",
    title="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    arxiv="2404.05892",
    tiny=dict(head_dim=8, mix_rank=4, decay_rank=4),
)
class RWKV6(Mixer):
    """RWKV-6 time mixing.

    Equation, with d = x_{t-1} - x_t and x^c = x + d (mix_c + tanh((x + d mix_x) A_c) B_c) for c in w, k, v, r, g,
    per head (S is N x N)::

        r = x^r W_r,  k = x^k W_k,  v = x^v W_v,  w = exp(-exp(decay_bias + tanh(x^w A) B))
        o_t = (S_{t-1} + diag(bonus) k_t v_t^T)^T r_t        S_t = diag(w_t) S_{t-1} + k_t v_t^T
        y = (GroupNorm(o) * silu(x^g W_g)) W_o

    - The state is read before the token's own decay and write; the token sees itself through `bonus`.
    - The query is not scaled. `norm_eps` is 1e-5 times the square of the authors' head_size_divisor 8.
    - A document's first token sees zeros in place of the token before.
    - At initialisation W_o and the first low-rank factors are zero, as in the authors' training code.

    Source: arXiv 2404.05892. Shapes: x, y (B, T, dim), H = dim / head_dim heads, N = head_dim.
    State: x_prev (dim), memory (H, N, N).
    """

    no_weight_decay = ("mix", "mix_down", "mix_up", "decay_down", "decay_up", "bonus")

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        mix_rank: int = 32,
        decay_rank: int = 64,
        norm_eps: float = 64e-5,
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
        self.mix_rank, self.decay_rank, self.norm_eps = mix_rank, decay_rank, norm_eps
        self.layer_index, self.num_layers = layer_index, num_layers
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **factory))

        views = len(_VIEWS)
        self.mix_x, self.mix = parameter(dim), parameter(views, dim)
        self.mix_down, self.mix_up = parameter(dim, views * mix_rank), parameter(views, mix_rank, dim)
        self.decay_bias, self.decay_down, self.decay_up = (
            parameter(dim),
            parameter(dim, decay_rank),
            parameter(decay_rank, dim),
        )
        self.bonus = parameter(self.num_heads, head_dim)
        self.r_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False, **factory) for _ in range(5)
        )
        self.norm_weight, self.norm_bias = parameter(dim), parameter(dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' training initialisation: channels spread from short to long memory, more so in deep layers."""
        D = self.dim
        depth = self.layer_index / max(self.num_layers - 1, 1)
        shallow = 1 - self.layer_index / self.num_layers
        i = torch.arange(D, dtype=torch.float64)
        ramp, line = i / D, i / max(D - 1, 1)
        self.mix_x.copy_(1 - ramp**shallow)
        powers = {"w": 1.0, "k": 1.0, "v": 1.0, "r": 0.5, "g": 0.5}
        self.mix.copy_(
            torch.stack([1 - ramp ** (powers[name] * shallow) - 0.3 * depth * (name == "v") for name in _VIEWS])
        )
        self.decay_bias.copy_(-6 + 5 * line ** (0.7 + 1.3 * depth))
        self.bonus.copy_((depth * (1 - line) + 0.1 * ((i + 1) % 3 - 1)).view_as(self.bonus))
        for down, up in ((self.mix_down, self.mix_up), (self.decay_down, self.decay_up)):
            down.zero_()
            up.uniform_(-0.01, 0.01)
        for part, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.g_proj, 0.1)):
            orthogonal_(part.weight, gain=gain)
        self.o_proj.weight.zero_()
        self.norm_weight.fill_(((1 + self.layer_index) / self.num_layers) ** 0.7)
        self.norm_bias.zero_()

    def state_spec(self) -> dict[str, Any]:
        return {"x_prev": ((self.dim,), "input"), "memory": (self.num_heads, self.head_dim, self.head_dim)}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        shifted, x_prev = token_shift(x, state["x_prev"], segments)
        xw, xk, xv, xr, xg = self._views(x, shifted - x)
        wide = accumulation_dtype(x.dtype)  # a decay of 0.999 has no room in half precision
        d = torch.tanh(xw @ self.decay_down) @ self.decay_up
        log_decay = -torch.exp((d.to(wide) + self.decay_bias.to(wide)).clamp(max=_WEAKEST))
        r, k, v, log_decay = (
            split_heads(part, self.num_heads) for part in (self.r_proj(xr), self.k_proj(xk), self.v_proj(xv), log_decay)
        )
        o, memory = linear_attention(
            r.to(wide),
            k,
            v,
            log_decay,
            scale=_SMALL,
            state=state["memory"],
            segments=segments,
            read_before_write=True,
            bonus=self.bonus,
        )
        o = functional.layer_norm(o, (self.head_dim,), eps=self.norm_eps * _SMALL**2).flatten(-2).to(x.dtype)
        # The norm's bias does not speak on padding: the gate is closed there.
        y = torch.addcmul(self.norm_bias, o, self.norm_weight) * functional.silu(self.g_proj(xg))
        return self.o_proj(y), State(x_prev=x_prev, memory=memory)

    def _views(self, x: Tensor, change: Tensor) -> tuple[Tensor, ...]:
        """x^c for each c: how far towards the token before is itself chosen by the two tokens."""
        low = torch.tanh(torch.addcmul(x, change, self.mix_x) @ self.mix_down).chunk(len(_VIEWS), -1)
        # One after the other: five views in one tensor do not fit the cache, forward or backward.
        shares = (mix + part @ up for mix, part, up in zip(self.mix, low, self.mix_up, strict=True))
        return tuple(torch.addcmul(x, change, share) for share in shares)
