"""Hyena: gates and causal convolutions as long as the sequence, whose filters a small network makes of time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate import ops
from tidegate.nn.mixer import GROWS, Mixer, accumulation_dtype
from tidegate.nn.parts import ShortConvolution
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

FILTERS = ("implicit", "free")
TARGET, FAST, SLOW = 1e-2, 0.3, 1.5  # the window falls to TARGET within FAST to SLOW times the grid


class ImplicitFilter(nn.Module):
    """A filter as a function of time: h(t), t = 0, 1, ... -> (t, dim), float32 at least.

    Equation, at u = t / (length - 1), with E - 1 = 2 n and f_1 ... f_n from 1e-4 to n - 1 in equal steps::

        z = (u, cos(2 pi f t / length), -sin(2 pi f t / length))
        h = sin(freq * (sin(freq * (sin(freq * (z W_1 + b_1)) W_2 + b_2)) W_3 + b_3)) W_4

    All three sines share `freq` (width), which starts at w: the higher, the faster the filters may vary, and the more
    rounding grows from layer to layer.
    """

    no_weight_decay = ("freq",)

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        width: int = 64,
        embedding: int = 33,
        w: float = 14.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.embedding, self.w = length, embedding, w
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(nn.Linear(n, width, **factory) for n in (embedding, width, width))
        self.out = nn.Linear(width, dim, bias=False, **factory)
        self.freq = nn.Parameter(torch.empty(width, **factory))
        for layer in (*self.layers, self.out):
            layer.no_weight_decay = ("weight",)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The linear maps as in PyTorch; freq = w."""
        for layer in (*self.layers, self.out):
            layer.reset_parameters()
        nn.init.constant_(self.freq, self.w)

    def forward(self, time: Tensor) -> Tensor:
        bands = (self.embedding - 1) // 2
        f = torch.linspace(1e-4, bands - 1, bands, dtype=time.dtype, device=time.device)
        angle = 2 * math.pi / self.length * time[:, None] * f
        z = torch.cat([time[:, None] / (self.length - 1), angle.cos(), -angle.sin()], dim=1)
        wide = accumulation_dtype(self.freq.dtype)
        z = z.to(wide)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            z = torch.sin(self.freq.to(wide) * functional.linear(z, layer.weight.to(wide), layer.bias.to(wide)))
        return functional.linear(z, self.out.weight.to(wide))


@register(
    "hyena",
    family="convolution",
    paper="hyena",
    title="Hyena Hierarchy: Towards Larger Convolutional Language Models",
    arxiv="2302.10866",
    tiny=dict(order=3, filter_order=16, emb_dim=5, w=1.0, max_length=64),
    presets={"recall": dict(emb_dim=5, w=10.0), "official": dict(emb_dim=3, w=1.0)},
    exceptions={"constant_state": "a filter as long as the sequence has no recurrence: every token's input is kept"},
)
class Hyena(Mixer):
    """Hyena operator.

    Equation, with O = `order` gates x^0 ... x^(O-1)::

        x^0, ..., x^(O-1), v = conv(x W_in + b)                              conv: short, causal, depthwise
        v_t <- sum_{s<=t} h^n_{t-s} x^m_s v_s + bias^n x^m_t v_t             n = 0 ... O - 2, m = O - 1 - n
        y = (x^0 * v) W_out + b_out

        h^n_t = window_t f_n(t),    window_t = exp(-rate t / (max_length - 1)) + shift

    - `filter_kind="implicit"`: f is a network of time with sines between its layers (`ImplicitFilter`), `filter_order`
      wide, of `emb_dim` features (odd); "free": f are `max_length` numbers per channel, and 0 after them.
    - `max_length` is the unit of the filter's time, not a limit. Another one makes another filter of the same weights.
      Beyond it, where the official code cuts the sequence off, time goes on: t / (max_length - 1) > 1, and the window
      falls further.
    - `modulate=False` leaves the window out. `normalise` divides each h_t by the sum of its absolute values over the
      channels. Rates are constants, from 3.07 to 15.4.
    - The filters up to the last token are made anew in every call, so a single token costs O(past) as its sum does.
    - Left out are the official code's several heads (which mix up axes there), blocks and mixing between the steps, and
      the distillation of the filters into a state space model (arXiv 2310.18780), for a state of fixed size.

    Initialisation: bias ~ N(0, 1); the linear maps as torch.nn.Linear, free filters uniform in ±max_length^(-1/2).
    Source: arXiv 2302.10866 and its code. Shapes: x, y (B, T, dim).
    State: convolution (conv_width - 1, (O + 1) dim), input tail; past_0 ... (L, dim), what went into each long
    convolution, L = tokens fed; length, the tokens of the current document.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: int = 2,
        filter_kind: str = "implicit",
        filter_order: int = 64,
        emb_dim: int = 33,
        w: float = 14.0,
        max_length: int = 2048,
        modulate: bool = True,
        normalise: bool = False,
        shift: float = 0.0,
        conv_width: int = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.order, self.filter_kind, self.filter_order = dim, order, filter_kind, filter_order
        self.emb_dim, self.w, self.max_length, self.modulate = emb_dim, w, max_length, modulate
        self.normalise, self.shift, self.conv_width, self.bias = normalise, shift, conv_width, bias
        if order < 2:
            raise ValueError(f"order: seen {order}, wanted at least 2, one long convolution")
        if filter_kind not in FILTERS:
            raise ValueError(f"filter_kind: seen {filter_kind!r}, wanted one of {', '.join(FILTERS)}")
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim: seen {emb_dim}, wanted an odd number from 3 on: time, and pairs of waves")
        for name, value, least in (("filter_order", filter_order, 1), ("max_length", max_length, 2)):
            if value < least:
                raise ValueError(f"{name}: seen {value}, wanted at least {least}")
        if conv_width < 1:
            raise ValueError(f"conv_width: seen {conv_width}, wanted at least 1")

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = (order - 1) * dim
        self.in_proj = nn.Linear(dim, (order + 1) * dim, bias=bias, **factory)
        self.conv = ShortConvolution((order + 1) * dim, conv_width, bias=True, activation=False, **factory)
        if filter_kind == "implicit":
            self.filter = ImplicitFilter(
                channels, max_length, width=filter_order, embedding=emb_dim, w=w, device=device, dtype=dtype
            )
        else:
            self.taps = nn.Parameter(torch.empty(max_length, channels, **factory))
        self.direct = nn.Parameter(torch.empty(channels, **factory))
        self.o_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        nn.init.normal_(self.direct)
        if self.filter_kind == "free":
            nn.init.uniform_(self.taps, -(self.max_length**-0.5), self.max_length**-0.5)

    def state_spec(self) -> Mapping[str, Any]:
        past = {f"past_{n}": ((GROWS, self.dim), "input") for n in range(self.order - 1)}
        tail = ((self.conv_width - 1, (self.order + 1) * self.dim), "input")
        return {"convolution": tail, **past, "length": ((), torch.int64)}

    def filters(self, length: int) -> Tensor:
        """h at the positions 0 ... length - 1, (length, (order - 1) dim), the steps side by side; float32 at least."""
        wide = accumulation_dtype(self.direct.dtype)
        # Positions and angles in float64: a wave's argument at position 100,000 has no digits to spare in float32.
        time = torch.arange(length, dtype=torch.float64, device=self.direct.device)
        if self.filter_kind == "implicit":
            h = self.filter(time)
        else:
            h = functional.pad(self.taps.to(wide), (0, 0, 0, length))[:length]
        if self.modulate:
            slow, fast = math.log(TARGET) / SLOW, math.log(TARGET) / FAST
            rate = torch.linspace(-slow, -fast, h.shape[1], dtype=wide, device=h.device)
            h = h * (torch.exp(-(time[:, None] / (self.max_length - 1)).to(wide) * rate) + self.shift)
        if self.normalise:
            h = h / h.abs().sum(1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        return h

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        fresh = state is None
        x, state = self.prepare(x, state, segments)
        z, tail = self.conv(self.in_proj(x), state["convolution"], segments)
        first, *gates, v = z.chunk(self.order + 1, dim=-1)
        filters = self.filters(state["past_0"].shape[1] + x.shape[1])
        new = {"convolution": tail}
        steps = zip(reversed(gates), filters.chunk(len(gates), 1), self.direct.chunk(len(gates)), strict=True)
        for n, (gate, taps, direct) in enumerate(steps):
            v = gate * v
            past = None if fresh else (state[f"past_{n}"], state["length"])
            found, (new[f"past_{n}"], length) = ops.long_convolution(v, taps.t(), state=past, segments=segments)
            v = torch.addcmul(found, direct, v)
        return zero_padding(self.o_proj(first * v), segments), State(new, length=length)
