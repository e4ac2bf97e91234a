"""Quasi-recurrent network: convolutions make the gates, an elementwise average over time pools them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import token_shift
from tidegate.ops import scan
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

POOLINGS = {"f": 2, "fo": 3, "ifo": 4}  # and how many blocks of rows the projection has


@register(
    "qrnn",
    family="scan",
    paper="recurrent-cells",
    title="Quasi-Recurrent Neural Networks",
    arxiv="1611.01576",
    tiny=dict(window=3),
    presets={"f": dict(pooling="f"), "ifo": dict(pooling="ifo"), "character-translation": dict(window=6)},
)
class QRNN(Mixer):
    """Quasi-recurrent network (QRNN), hidden size dim.

    Equation, with u_t the last `window` tokens side by side, x_{t - window + 1} ... x_t::

        z, f, o, i = tanh(W_z u + b_z), sigmoid(W_f u + b_f), sigmoid(W_o u + b_o), sigmoid(W_i u + b_i)
        c_t = f_t * c_{t-1} + (1 - f_t) * z_t                   pooling "f": y = c;   "fo": y = o * c
        c_t = f_t * c_{t-1} + i_t * z_t                         pooling "ifo": y = o * c

    - f is what is kept, as in the paper; in the authors' code it is what is written, so negate its rows of those
      weights. The window is that of the paper, any width; it never reaches into another document.
    - `zoneout`: in training, at random, a channel keeps its value for a token (1 - f, and i, are zero there, without
      rescaling); in evaluation they have the expected size, (1 - zoneout) times their own, as in the authors' code.
    - `forget_bias` is b_f at initialisation: above 0 a channel starts by remembering.

    Initialisation: weights uniform in ±(window dim)^(-1/2), biases zero but for `forget_bias`.
    Source: arXiv 1611.01576. Shapes: x, y (B, T, dim). State: window (window - 1, dim), memory (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 2,
        pooling: str = "fo",
        zoneout: float = 0.0,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.window, self.pooling, self.zoneout, self.forget_bias = dim, window, pooling, zoneout, forget_bias
        if window < 1:
            raise ValueError(f"window: seen {window}, wanted at least 1 token")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: seen {pooling!r}, wanted 'f', 'fo' or 'ifo'")
        if not 0 <= zoneout < 1:
            raise ValueError(f"zoneout: seen {zoneout}, wanted a probability below 1")
        self.zfoi_proj = nn.Linear(window * dim, POOLINGS[pooling] * dim, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        bound = 1 / math.sqrt(self.window * self.dim)
        nn.init.uniform_(self.zfoi_proj.weight, -bound, bound)
        nn.init.zeros_(self.zfoi_proj.bias)
        self.zfoi_proj.bias[self.dim : 2 * self.dim] = self.forget_bias

    def state_spec(self) -> dict[str, Any]:
        return {"window": ((self.window - 1, self.dim), "input"), "memory": (self.dim,)}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        tokens: list[Tensor] = [x]
        tail: list[Tensor] = []
        for earlier in reversed(state["window"].unbind(1)):  # the token before, the one before that, ...
            shifted, last = token_shift(tokens[0], earlier, segments)
            tokens, tail = [shifted, *tokens], [last, *tail]
        projected = self.zfoi_proj(torch.cat(tokens, -1)).to(accumulation_dtype(x.dtype))
        z, f, *gates = projected.chunk(POOLINGS[self.pooling], -1)
        write = torch.sigmoid(-f)
        if self.zoneout:
            moving = self._moving(write)
            write = write * moving
        decay = 1 - write
        if self.pooling == "ifo":
            write = torch.sigmoid(gates[1]) * moving if self.zoneout else torch.sigmoid(gates[1])
        c, memory = scan(decay, write * torch.tanh(z), state=state["memory"], segments=segments)
        y = c if self.pooling == "f" else torch.sigmoid(gates[0]) * c
        window = torch.stack(tail, 1) if tail else state["window"]
        return zero_padding(y.to(x.dtype), segments), State(window=window, memory=memory)

    def _moving(self, like: Tensor) -> Tensor | float:
        """Which channels are not to keep their value, drawn anew for every token; in evaluation what part of each."""
        return torch.empty_like(like).bernoulli_(1 - self.zoneout) if self.training else 1 - self.zoneout
