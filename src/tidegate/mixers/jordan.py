"""Jordan network: what comes back at the next token is the output, not the hidden layer."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register

NONLINEARITIES = ("tanh", "relu", "sigmoid")
READOUTS = {"identity": "V @ h + c", "tanh": "tanh(V @ h + c)", "sigmoid": "sigmoid(V @ h + c)"}


@register(
    "jordan",
    family="cell",
    paper="recurrent-cells",
    title="Serial Order: A Parallel Distributed Processing Approach (Jordan, 1986)",
    tiny=dict(alpha=0.5),
    presets={
        "1986": dict(alpha=0.5, nonlinearity="sigmoid", output_activation="sigmoid"),
        "heads": dict(num_heads=4),
    },
)
class Jordan(CellMixer):
    """Jordan network, hidden size dim.

    Equation, with the context s, g the identity or another `output_activation`::

        h_t = tanh(W x_t + b + U s_{t-1})                          `nonlinearity`: tanh, relu or sigmoid
        y_t = g(V h_t + c)
        s_t = alpha * s_{t-1} + y_t

    - The output feeds back. alpha, fixed, in [0, 1), makes the context a fading sum of all outputs; 0 keeps the last
      one alone. The network of 1986 is logistic throughout and has such a loop.
    - `num_heads` makes U and V block-diagonal: heads do not see each other, and the recurrence costs that much less.
    - Targets are not put in the place of outputs in training: outputs are features of width dim here, not answers.

    Initialisation: uniform in ±dim^(-1/2).
    Source: Jordan 1986 (ICS report 8604). Shapes: x, y (B, T, dim). State: s (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        alpha: float = 0.0,
        nonlinearity: str = "tanh",
        output_activation: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.alpha = dim, alpha
        self.nonlinearity, self.output_activation = nonlinearity, output_activation
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha: seen {alpha}, wanted a number in [0, 1)")
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(
                f"nonlinearity: seen {nonlinearity!r}, wanted one of {', '.join(map(repr, NONLINEARITIES))}"
            )
        if output_activation not in READOUTS:
            raise ValueError(
                f"output_activation: seen {output_activation!r}, wanted one of {', '.join(map(repr, READOUTS))}"
            )
        lines = [f"h = {nonlinearity}(W @ x + U @ s)", f"y = {READOUTS[output_activation]}", f"s = {alpha} * s + y"]
        self._build(Cell("\n".join(lines), "s"), num_heads, device, dtype)
