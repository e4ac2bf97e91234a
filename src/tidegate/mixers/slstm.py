"""sLSTM: an LSTM with exponential gates, kept in range by a running maximum, and xLSTM's block around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.mixers.mlstm import norm_per_head
from tidegate.nn.cell import CellLayer
from tidegate.nn.parts import ShortConvolution, check_heads
from tidegate.ops.cell import Cell
from tidegate.registry import register
from tidegate.segments import Segments
from tidegate.state import State

# n is 0 before the first token and at least 1 after it, as one of keep and write always is 1.
EQUATIONS = """
    i = W_i @ x + U_i @ h
    a = {log_forget} + m
    m = where(n > 0, maximum(a, i), i)
    keep = exp(minimum(a - m, 0))
    write = exp(i - m)
    c = keep * c + write * tanh(W_z @ x + U_z @ h)
    n = keep * n + write
    h = sigmoid(W_o @ x + U_o @ h) * c / n
"""
CELLS = {
    "sigmoid": Cell(EQUATIONS.format(log_forget="log_sigmoid(W_f @ x + U_f @ h)"), "h c n m"),
    "exp": Cell(EQUATIONS.format(log_forget="W_f @ x + U_f @ h"), "h c n m"),
}


@register(
    "slstm",
    family="cell",
    paper="recurrent-cells",
    title="xLSTM: Extended Long Short-Term Memory",
    arxiv="2405.04517",
    tiny=dict(num_heads=2),
    presets={
        "block": dict(conv_width=4, headwise=True, norm="layer"),
        "cell": dict(conv_width=None, headwise=False, norm=None),
    },
)
class SLSTM(CellLayer):
    """Scalar-memory LSTM (sLSTM) of the xLSTM, hidden size dim.

    Equation, u = silu(conv(x)), and per head (U does not see other heads)::

        i~, f~ = W u_t + U h_{t-1} + b              z~, o~ = W x_t + U h_{t-1} + b
        log f = log sigmoid(f~)
        m_t = max(log f + m_{t-1}, i~)              for the first token m_t = i~
        f', i' = exp(log f + m_{t-1} - m_t), exp(i~ - m_t)
        c_t = f' * c_{t-1} + i' * tanh(z~)          n_t = f' * n_{t-1} + i'
        h_t = sigmoid(o~) * c_t / n_t               y_t = LayerNorm_head(h_t)

    - c / n is a mean of all tanh(z~) so far, weighted by exponentials; m, the running maximum of their logarithms,
      keeps them in range and drops out of h. The input gate has no upper end: one token can displace all before it.
    - `forget_gate="exp"` has log f = f~, the paper's other choice, which can also make the past weigh more.
    - The defaults are the block's, without its feed-forward layer: `conv_width=None` leaves out u, `norm=None` the norm
      ("rms" is RMSNorm), `headwise=False` gives W all of x. `preset="cell"` is the recurrence alone.
    - `forget_bias` is b_f everywhere. None spreads it within each head, b_f(j) = 5 - 12 (j / (d - 1))^p, from 5 down to
      -7, with p = 0.3 in the first layer and 1.6 in the last.

    Initialisation (official code): W N(0, 2 / (5 dim)), U zero (`recurrent_init="uniform"`: ±dim^(-1/2)), other biases
    zero. Weights, biases and states are in the order i, f, z, o.
    Source: arXiv 2405.04517. Shapes: x, y (B, T, dim).
    State: h, c, n, m (dim); with convolution (conv_width - 1, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        conv_width: int | None = 4,
        headwise: bool = True,
        norm: str | None = "layer",
        norm_eps: float = 1e-5,
        forget_gate: str = "sigmoid",
        forget_bias: float | None = None,
        recurrent_init: str = "zeros",
        layer_index: int = 0,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.conv_width, self.headwise = dim, num_heads, conv_width, headwise
        self.norm, self.norm_eps, self.forget_gate, self.forget_bias = norm, norm_eps, forget_gate, forget_bias
        self.recurrent_init, self.layer_index, self.num_layers = recurrent_init, layer_index, num_layers
        self.head_dim = check_heads(dim, num_heads)
        if forget_gate not in CELLS:
            raise ValueError(f"forget_gate: seen {forget_gate!r}, wanted 'sigmoid' or 'exp'")
        if norm not in ("layer", "rms", None):
            raise ValueError(f"norm: seen {norm!r}, wanted 'layer', 'rms' or None")
        if recurrent_init not in ("zeros", "uniform"):
            raise ValueError(f"recurrent_init: seen {recurrent_init!r}, wanted 'zeros' or 'uniform'")
        if conv_width is not None and conv_width < 1:
            raise ValueError(f"conv_width: seen {conv_width}, wanted at least 1, or None for no convolution")
        self.cell = CELLS[forget_gate]

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convolution = None if conv_width is None else ShortConvolution(dim, conv_width, bias=True, **factory)
        self.weight_ih = nn.Parameter(torch.empty(4 * dim, self.head_dim if headwise else dim, **factory))
        self.weight_hh = nn.Parameter(torch.empty(4 * dim, self.head_dim, **factory))
        self.bias_ih = nn.Parameter(torch.empty(4 * dim, **factory))
        self.norm_weight = None if norm is None else nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        nn.init.normal_(self.weight_ih, std=(2 / (5 * self.dim)) ** 0.5)
        nn.init.zeros_(self.weight_hh)
        if self.recurrent_init == "uniform":
            nn.init.uniform_(self.weight_hh, -(self.dim**-0.5), self.dim**-0.5)
        nn.init.zeros_(self.bias_ih)
        forget = self.bias_ih[self.dim : 2 * self.dim].view(self.num_heads, -1)
        if self.forget_bias is None:
            power = 0.3 + 1.3 * self.layer_index / max(self.num_layers - 1, 1)
            place = torch.linspace(0, 1, self.head_dim, device=forget.device, dtype=forget.dtype)
            forget.copy_(5 - 12 * place**power)
        else:
            forget.fill_(self.forget_bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def state_spec(self) -> dict[str, Any]:
        tail = {} if self.conv_width is None else {"convolution": ((self.conv_width - 1, self.dim), "input")}
        return {**tail, **{name: (self.dim,) for name in self.cell.states}}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        tail = {}
        if self.convolution is None:
            inputs = self._products(x, self.weight_ih)
        else:
            u, tail["convolution"] = self.convolution(x, state["convolution"], segments)
            weights = self.weight_ih.chunk(2)
            inputs = torch.cat([self._products(u, weights[0]), self._products(x, weights[1])], 2)
        inputs = inputs + self.bias_ih.view(4, -1)
        matrices = self.weight_hh.view(4, self.num_heads, self.head_dim, self.head_dim)
        h, after = self.over_time(inputs, matrices, None, state, segments)
        if self.norm_weight is not None and self.norm is not None:
            h = norm_per_head(h.unflatten(-1, (self.num_heads, -1)), self.norm_weight, self.norm, self.norm_eps)
        return h, State(**tail, **after)

    def _products(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, gates, dim)."""
        if not self.headwise:
            return nn.functional.linear(x, weight).unflatten(-1, (-1, self.dim))
        blocks = weight.view(-1, self.num_heads, self.head_dim, self.head_dim)
        return torch.einsum("bthi,ghji->btghj", x.unflatten(-1, (self.num_heads, -1)), blocks).flatten(-2)
