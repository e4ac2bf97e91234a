"""minLSTM: a long short-term memory whose gates do not see the state, so that it is a scan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.nn.min_rnn import MinRNN
from tidegate.registry import register


@register(
    "min-lstm",
    family="scan",
    paper="recurrent-cells",
    title="Were RNNs All We Needed?",
    arxiv="2410.01201",
    tiny=dict(expand=1.5),
    presets={"vanilla": dict(candidate="linear"), "independent-gates": dict(normalise=False)},
)
class MinLSTM(MinRNN):
    """Minimal long short-term memory (minLSTM).

    Equation::

        f_t, i_t = sigmoid(W_f x_t + b_f), sigmoid(W_i x_t + b_i)        c_t = g(W_h x_t + b_h)
        h_t = f_t / (f_t + i_t) * h_{t-1} + i_t / (f_t + i_t) * c_t

    - One state: without output gate and tanh, cell and hidden state are the same.
    - The quotients make h a weighted mean of the candidates c, whatever the length; they are computed as
      sigmoid(log f - log i), which has no 0 / 0. `normalise=False` leaves them out: h_t = f_t * h_{t-1} + i_t * c_t.
    - `candidate="positive"`: g(v) = v + 1/2 for v >= 0, sigmoid(v) below, so that h > 0. It is what the paper calls
      the log-space version, whose scan runs on log h. This one runs on h: the same numbers, and without logarithms it
      takes any state, zero included. "linear" is g(v) = v, the paper's vanilla version.
    - `expand` != 1 makes the state expand * dim wide and adds the projection back, as the paper's language models do.
    - `forget_bias` is b_f at initialisation: above 0 the unit starts by remembering, which the paper found to help.

    Initialisation: weights uniform in ±fan_in^(-1/2), biases zero but for `forget_bias`.
    Source: arXiv 2410.01201. Shapes: x, y (B, T, dim). State: memory (expand dim).
    """

    gates = 2

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 1.0,
        candidate: str = "positive",
        normalise: bool = True,
        bias: bool = True,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.expand, self.candidate, self.normalise = dim, expand, candidate, normalise
        self.bias, self.forget_bias = bias, forget_bias
        self._build(device, dtype)
        self.reset_parameters()

    def _set_forget_bias(self, biases: Tensor) -> None:
        biases[0] = self.forget_bias

    def _coefficients(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        f, i = logits
        if not self.normalise:
            return torch.sigmoid(f), torch.sigmoid(i)
        write = torch.sigmoid(functional.logsigmoid(i) - functional.logsigmoid(f))
        return 1 - write, write
