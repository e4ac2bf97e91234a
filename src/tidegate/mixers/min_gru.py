"""minGRU: a gated recurrent unit whose gate does not see the state, so that it is a scan."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.nn.min_rnn import MinRNN
from tidegate.registry import register


@register(
    "min-gru",
    family="scan",
    paper="recurrent-cells",
    title="Were RNNs All We Needed?",
    arxiv="2410.01201",
    tiny=dict(expand=1.5),
    presets={"vanilla": dict(candidate="linear")},
)
class MinGRU(MinRNN):
    """Minimal gated recurrent unit (minGRU).

    Equation::

        z_t = sigmoid(W_z x_t + b_z)        c_t = g(W_h x_t + b_h)
        h_t = (1 - z_t) * h_{t-1} + z_t * c_t

    - No reset gate, no tanh: the GRU without what makes it sequential. h is a weighted mean of the candidates c.
    - `candidate="positive"`: g(v) = v + 1/2 for v >= 0, sigmoid(v) below, so that h > 0. It is what the paper calls
      the log-space version, whose scan runs on log h. This one runs on h: the same numbers, and without logarithms it
      takes any state, zero included. "linear" is g(v) = v, the paper's vanilla version.
    - `expand` != 1 makes the state expand * dim wide and adds the projection back, as the paper's language models do.
    - `forget_bias` is the keep gate's bias at initialisation, -b_z: above 0 the unit starts by remembering.

    Initialisation: weights uniform in ±fan_in^(-1/2), biases zero but for `forget_bias`.
    Source: arXiv 2410.01201. Shapes: x, y (B, T, dim). State: memory (expand dim).
    """

    gates = 1

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 1.0,
        candidate: str = "positive",
        bias: bool = True,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.expand, self.candidate, self.bias, self.forget_bias = dim, expand, candidate, bias, forget_bias
        self._build(device, dtype)
        self.reset_parameters()

    def _set_forget_bias(self, biases: Tensor) -> None:
        biases[0] = -self.forget_bias

    def _coefficients(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        z = torch.sigmoid(logits[0])
        return 1 - z, z
