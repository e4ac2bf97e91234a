"""Minimal gated unit: one gate that forgets and resets, in the paper's form and Flax's."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

GATES = {  # what the gate sees
    "full": "W_f @ x + U_f @ h",
    "state-bias": "U_f @ h + b_f",
    "state": "U_f @ h",
    "bias": "b_f",
}
CONVENTIONS = {
    "paper": ("tanh(W_n @ x + U_n @ (f * h))", "(1 - f) * h + f * n"),
    "flax": ("tanh(W_n @ x + f * (U_n @ h + b_n))", "f * h + (1 - f) * n"),
}


@register(
    "mgu",
    family="cell",
    paper="recurrent-cells",
    title="Minimal Gated Unit for Recurrent Neural Networks",
    arxiv="1603.09420",
    presets={
        "flax": dict(convention="flax"),
        "mgu1": dict(gate="state-bias"),
        "mgu2": dict(gate="state"),
        "mgu3": dict(gate="bias"),
        "heads": dict(num_heads=4),
    },
)
class MGU(CellMixer):
    """Minimal gated unit (MGU), hidden size dim.

    Equation::

        f = sigmoid(W_f x_t + U_f h_{t-1} + b_f)
        n = tanh(W_n x_t + b_n + U_n (f * h_{t-1}))     y_t = h_t = (1 - f) * h_{t-1} + f * n        convention="paper"
        n = tanh(W_n x_t + b_n + f * (U_n h_{t-1} + b'_n))          h_t = f * h_{t-1} + (1 - f) * n  convention="flax"

    - A GRU whose two gates are one. The conventions differ in two things, where the reset stands and what f = 1 means:
      the paper writes with f, Flax's MGUCell keeps with it. "paper" takes two dependent products per token.
    - `gate` says what the gate sees: "full"; "state-bias", U_f h + b_f; "state", U_f h; "bias", b_f alone, a constant
      for each channel. The presets mgu1, mgu2 and mgu3 are the latter three under their authors' names.
    - `forget_bias` is the bias of what is kept at initialisation, b_f in Flax's convention and -b_f in the paper's:
      above 0 the cell starts by keeping. gate="state" has no such bias.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: uniform in ±dim^(-1/2) but for b_f and, under "flax", b'_n = 0.
    Source: arXiv 1603.09420; slim gates 1701.03452; heads 2412.07752. Shapes: x, y (B, T, dim). State: h (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        convention: str = "paper",
        gate: str = "full",
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.convention, self.gate, self.forget_bias = dim, convention, gate, forget_bias
        if convention not in CONVENTIONS:
            raise ValueError(f"convention: seen {convention!r}, wanted 'paper' or 'flax'")
        if gate not in GATES:
            raise ValueError(f"gate: seen {gate!r}, wanted one of {', '.join(map(repr, GATES))}")
        candidate, mixture = CONVENTIONS[convention]
        cell = Cell(f"f = sigmoid({GATES[gate]})\nn = {candidate}\nh = {mixture}", "h")
        self._build(cell, num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        bias = self.forget_bias if self.convention == "flax" else -self.forget_bias
        if self.gate == "full":
            self._set_bias("W_f", bias)
        elif self.gate != "state":
            self._set_vector("b_f", bias)
        if self.convention == "flax":
            self._set_vector("b_n", 0.0)
