"""Stackable recurrent cell: one gate between what was and what comes, inside of a tanh."""

from __future__ import annotations

import math

import torch

from tidegate.nn.cell import CellMixer, check_chrono
from tidegate.nn.orthogonal import orthogonal_
from tidegate.ops.cell import Cell
from tidegate.registry import register


@register(
    "star",
    family="cell",
    paper="recurrent-cells",
    title="Gating Revisited: Deep Multi-layer RNNs That Can Be Trained",
    arxiv="1911.11033",
    presets={"heads": dict(num_heads=4)},
)
class STAR(CellMixer):
    """Stackable recurrent cell (STAR), hidden size dim.

    Equation::

        z = tanh(W_z x_t + b_z)                         s = W_k x_t + b_k + U_k h_{t-1}
        y_t = h_t = tanh((1 - sigmoid(s)) * h_{t-1} + sigmoid(s + beta) * z)

    - The paper's k is sigmoid(s), and its `beta` 0. The authors' code has 1 there, as JANET has: more is let in than
      was let go.
    - It is meant for deep stacks: the paper finds that gradients keep their size from layer to layer.
    - `chrono_length` draws b_k = -log U(1, length - 1), for memories of up to that many tokens; the authors have it at
      the length of their sequences. `forget_bias` is -b_k without it: above 0 the cell starts by keeping its state.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: W and U orthogonal, gate by gate and head by head; b_z zero, b_k as above.
    Source: arXiv 1911.11033 and its code; chrono initialisation 1804.11188; heads 2412.07752. Shapes: x, y (B, T, dim).
    State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        beta: float = 0.0,
        forget_bias: float = 1.0,
        chrono_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.beta, self.forget_bias, self.chrono_length = dim, beta, forget_bias, chrono_length
        check_chrono(chrono_length)
        if not math.isfinite(beta):
            raise ValueError(f"beta: seen {beta}, wanted a finite number")
        lines = ["z = tanh(W_z @ x)", "s = W_k @ x + U_k @ h", "k = sigmoid(s)"]
        share = f"sigmoid(s + {beta})" if beta else "k"
        lines += [f"h = tanh((1 - k) * h + {share} * z)"]
        self._build(Cell("\n".join(lines), "h"), num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        assert self.weight_hh is not None
        orthogonal_(self.weight_ih, self.dim)
        orthogonal_(self.weight_hh, self.weight_hh.shape[1])
        keep = self.forget_bias if self.chrono_length is None else self._chrono_bias(self.chrono_length)
        self._set_bias("W_z", 0.0)
        self._set_bias("W_k", -keep)
