"""JANET: an LSTM with no gate but the forget gate."""

from __future__ import annotations

import torch

from tidegate.nn.cell import CellMixer, check_chrono
from tidegate.ops.cell import Cell
from tidegate.registry import register


@register(
    "janet",
    family="cell",
    paper="recurrent-cells",
    title="The unreasonable effectiveness of the forget gate",
    arxiv="1804.04849",
    presets={"heads": dict(num_heads=4)},
)
class JANET(CellMixer):
    """Just another network (JANET), hidden size dim.

    Equation::

        s = W_f x_t + b_f + U_f c_{t-1}                 g = tanh(W_g x_t + b_g + U_g c_{t-1})
        y_t = c_t = sigmoid(s) * c_{t-1} + (1 - sigmoid(s - beta)) * g

    - An LSTM with the forget gate alone. `beta` > 0 lets more in than was let go: at its value of 1 the two shares
      add up to more than one, so that new inputs count beside old ones; at 0 they are coupled.
    - `chrono_length` draws b_f = log U(1, length - 1), for memories of up to that many tokens; the paper has it at the
      length of its sequences. `forget_bias` is b_f without it.
    - `num_heads` makes U block-diagonal: heads do not see each other, and the recurrence costs that much less.

    Initialisation: uniform in ±dim^(-1/2) but for b_f and b_g = 0.
    Source: arXiv 1804.04849; chrono initialisation 1804.11188; heads 2412.07752. Shapes: x, y (B, T, dim).
    State: c (dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        beta: float = 1.0,
        forget_bias: float = 1.0,
        chrono_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.beta, self.forget_bias, self.chrono_length = dim, beta, forget_bias, chrono_length
        check_chrono(chrono_length)
        # 1 - sigmoid(s - beta) = sigmoid(beta - s), which keeps its digits where it is small.
        lines = [
            "s = W_f @ x + U_f @ c",
            "g = tanh(W_g @ x + U_g @ c)",
            f"c = sigmoid(s) * c + sigmoid({beta} - s) * g",
        ]
        self._build(Cell("\n".join(lines), "c"), num_heads, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        self._set_bias("W_f", self.forget_bias if self.chrono_length is None else self._chrono_bias(self.chrono_length))
        self._set_bias("W_g", 0.0)
