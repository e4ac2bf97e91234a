"""ParaGRU: a gated recurrent unit whose channels remember each for itself."""

from __future__ import annotations

import torch

from tidegate.nn.para import ParaMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

CELL = Cell(
    """
    z = sigmoid(a_z * h + W_z @ x)
    r = sigmoid(a_r * h + W_r @ x)
    c = tanh(a_c * (h * r) + W_c @ x)
    h = (1 - z) * h + z * c
    """,
    "h",
)


@register(
    "para-gru",
    family="cell",
    paper="pararnn",
    title="ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models",
    arxiv="2510.21450",
    tiny=dict(num_heads=2),
    presets={
        "cell": dict(block=False, conv_width=None),
        "state-tracking": dict(block=False, conv_width=None, recurrent_std=1.0, recurrent_limit=None),
    },
)
class ParaGRU(ParaMixer):
    """Gated recurrent unit with a diagonal recurrence (ParaGRU), in a block with convolution and output gate.

    Equation, W block-diagonal with one block per head, a_z, a_r, a_c vectors::

        u, g = silu(conv(W_u x)), W_g x
        z_t, r_t = sigmoid(a * h_{t-1} + W u_t + b)
        c_t = tanh(a_c * (r_t * h_{t-1}) + W_c u_t + b_c)
        h_t = (1 - z_t) * h_{t-1} + z_t * c_t
        y_t = W_o (RMSNorm(h_t) * silu(g_t))

    - Channels meet in W and in the next layer, never in the recurrence: dh_t / dh_{t-1} is diagonal. That is what lets
      Newton's method solve all tokens at once; here the kernel goes token by token, which on a CPU is as fast. It is
      still nonlinear in h, and so can count modulo two, which no gated linear recurrence with positive gates can.
    - `constrain_()` clips the vectors to ±`recurrent_limit`; it belongs after every optimiser step, and
      `tidegate train` sees to it. 0.9 is the paper's bound for synthetic tasks, none for parity.
    - `block=False` is the cell alone: u = x, or silu(conv(x)), and y = h. `conv_width=None` leaves out the convolution.
      The preset "state-tracking" is the cell with wide, unbounded vectors, which learns the parity of bits.

    Initialisation: W as torch.nn.Linear, a N(0, `recurrent_std`^2) within the limit, by default (E / H)^(-1/2), b zero.
    Source: arXiv 2510.21450. Shapes: x, y (B, T, dim), E = expand dim.
    State: h (E); with convolution (conv_width - 1, E).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        expand: float = 1.0,
        block: bool = True,
        conv_width: int | None = 4,
        recurrent_std: float | None = None,
        recurrent_limit: float | None = 0.5,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.expand, self.block, self.conv_width = dim, num_heads, expand, block, conv_width
        self.recurrent_std, self.recurrent_limit, self.norm_eps = recurrent_std, recurrent_limit, norm_eps
        self._build(CELL, device, dtype)
