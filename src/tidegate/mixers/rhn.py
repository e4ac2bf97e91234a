"""Recurrent highway network: several gated layers from each token to the next."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer
from tidegate.ops.cell import Cell
from tidegate.registry import register


@register(
    "rhn",
    family="cell",
    paper="recurrent-cells",
    title="Recurrent Highway Networks",
    arxiv="1607.03474",
    tiny=dict(depth=2),
    presets={
        "ptb": dict(depth=10, transform_bias=-2.0),
        "enwik8": dict(depth=10, transform_bias=-4.0),
        "heads": dict(num_heads=4),
    },
)
class RHN(CellMixer):
    """Recurrent highway network (RHN), hidden size dim.

    Equation: `depth` micro-steps l = 1 ... L for each token, of which only the first sees the input::

        s_0 = y_{t-1}
        h = tanh([l = 1] W_h x_t + R_h s_{l-1} + b_h)             matrices R and biases b of their own for each l
        t = sigmoid([l = 1] W_t x_t + R_t s_{l-1} + b_t)          c = 1 - t
        s_l = h * t + s_{l-1} * c
        y_t = s_L

    - `coupled=False` gives the carry gate c weights of its own, c = sigmoid([l = 1] W_c x_t + R_c s_{l-1} + b_c).
    - `transform_bias` is b_t at initialisation, and -b_c: far below 0, the network starts as a copy of its state,
      whatever its depth. The paper has -2 for words, -4 for characters.
    - The products of a token wait for each other: it takes `depth` of them, and memory for as many. The first use of a
      new depth compiles it, for two to four seconds.
    - `num_heads` makes R block-diagonal: heads do not see each other, and the recurrence costs that much less.
    - Of the paper's dropout, one mask for all tokens and micro-steps, there is none here.

    Initialisation: uniform in ±dim^(-1/2) but for b_t and b_c.
    Source: arXiv 1607.03474; heads 2412.07752. Shapes: x, y (B, T, dim). State: s (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 5,
        num_heads: int = 1,
        coupled: bool = True,
        transform_bias: float = -2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.depth, self.coupled, self.transform_bias = dim, depth, coupled, transform_bias
        if depth < 1:
            raise ValueError(f"depth: seen {depth}, wanted at least 1 micro-step")
        self._build(Cell(_equations(depth, coupled), "s"), num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        for gate, bias in [("t", self.transform_bias), ("c", -self.transform_bias)][: 1 if self.coupled else 2]:
            self._set_bias(f"W_{gate}", bias)
            for level in range(2, self.depth + 1):
                self._set_vector(f"b_{gate}{level}", bias)


def _equations(depth: int, coupled: bool) -> str:
    lines = []
    for level in range(1, depth + 1):
        for gate, function in [("h", "tanh"), ("t", "sigmoid"), ("c", "sigmoid")][: 2 if coupled else 3]:
            other = f"W_{gate} @ x" if level == 1 else f"b_{gate}{level}"
            lines.append(f"{gate}{level} = {function}({other} + R_{gate}{level} @ s)")
        lines.append(f"s = h{level} * t{level} + s * " + (f"(1 - t{level})" if coupled else f"c{level}"))
    return "\n".join(lines)
