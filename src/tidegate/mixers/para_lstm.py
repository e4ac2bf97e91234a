"""ParaLSTM: a long short-term memory whose channels remember each for itself."""

from __future__ import annotations

import itertools

import torch

from tidegate.nn.para import ParaMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register


def _equations(coupled: bool, peephole: bool) -> str:
    def gate(name: str) -> str:
        see = f" + c_{name} * c" if peephole else ""
        return f"{name} = sigmoid(a_{name} * h{see} + W_{name} @ x)"

    first = [gate("f")] if coupled else [gate("f"), gate("i")]
    write = "(1 - f)" if coupled else "i"
    lines = [*first, "z = tanh(a_z * h + W_z @ x)", f"c = f * c + {write} * z", gate("o"), "h = o * tanh(c)"]
    return "\n".join(lines)


CELLS = {options: Cell(_equations(*options), "h c") for options in itertools.product((True, False), repeat=2)}


@register(
    "para-lstm",
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
class ParaLSTM(ParaMixer):
    """Long short-term memory with a diagonal recurrence (ParaLSTM), in a block with convolution and output gate.

    Equation, W block-diagonal with one block per head, a_f, c_f, ... vectors::

        u, g = silu(conv(W_u x)), W_g x
        f_t = sigmoid(a_f * h_{t-1} + c_f * c_{t-1} + W_f u_t + b_f)
        z_t = tanh(a_z * h_{t-1} + W_z u_t + b_z)
        c_t = f_t * c_{t-1} + (1 - f_t) * z_t
        o_t = sigmoid(a_o * h_{t-1} + c_o * c_t + W_o u_t + b_o)           h_t = o_t * tanh(c_t)
        y_t = W_y (RMSNorm(h_t) * silu(g_t))

    - The output gate's peephole sees the new c_t. `peephole=False` leaves c_f and c_o out; `coupled=False` has an input
      gate i of its own, as f is, for 1 - f.
    - Channels meet in W and in the next layer, never in the recurrence: the derivative of (c_t, h_t) by those before is
      a 2 x 2 matrix for each channel. On a CPU the kernel goes token by token.
    - `constrain_()` clips the vectors to ±`recurrent_limit`; it belongs after every optimiser step, and
      `tidegate train` sees to it. 0.9 is the paper's bound for synthetic tasks, none for parity.
    - `block=False` is the cell alone: u = x, or silu(conv(x)), and y = h. `conv_width=None` leaves out the convolution.
      The preset "state-tracking" is the cell with wide, unbounded vectors, which learns the parity of bits.

    Initialisation: W as torch.nn.Linear, vectors N(0, `recurrent_std`^2), by default (E / H)^(-1/2), within the limit,
    b zero.
    Source: arXiv 2510.21450. Shapes: x, y (B, T, dim), E = expand dim.
    State: h, c (E); with convolution (conv_width - 1, E).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        expand: float = 1.0,
        coupled: bool = True,
        peephole: bool = True,
        block: bool = True,
        conv_width: int | None = 4,
        recurrent_std: float | None = None,
        recurrent_limit: float | None = 0.5,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.expand, self.coupled, self.peephole = dim, num_heads, expand, coupled, peephole
        self.block, self.conv_width = block, conv_width
        self.recurrent_std, self.recurrent_limit, self.norm_eps = recurrent_std, recurrent_limit, norm_eps
        self._build(CELLS[coupled, peephole], device, dtype)
