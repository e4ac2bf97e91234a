"""Long short-term memory, on PyTorch's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.nn.torch_cell import TorchCell
from tidegate.registry import register


@register("lstm", family="cell", paper="recurrent-cells", title="Long Short-Term Memory")
class LSTM(TorchCell):
    """Long short-term memory (LSTM), hidden size dim.

    Equation::

        i, f, o = sigmoid(W x_t + b + U h_{t-1} + b')        g = tanh(the same with weights of its own)
        c_t = f * c_{t-1} + i * g                            y_t = h_t = o * tanh(c_t)

    - Parameters, their order i, f, g, o and the two biases are those of torch.nn.LSTM and LSTMCell.
    - `forget_bias` is the forget gate's bias at initialisation, exactly: PyTorch adds two biases, so one of them is
      zero. `chrono_length` instead draws biases for memories of up to that many tokens, b_f = log U(1, length - 1) and
      b_i = -b_f; what is to be remembered over long lags is hardly learnt without one of the two.

    Source: Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000; chrono initialisation arXiv 1804.11188.
    Shapes: x, y (B, T, dim). State: h (dim), c (dim).
    """

    gates, entries = 4, ("h", "c")

    def __init__(
        self,
        dim: int,
        *,
        forget_bias: float = 1.0,
        chrono_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.forget_bias, self.chrono_length = dim, forget_bias, chrono_length
        if chrono_length is not None and chrono_length < 3:
            raise ValueError(f"chrono_length: seen {chrono_length}, wanted at least 3 tokens, or None")
        self._build(dim, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±dim^(-1/2) but for the biases of the forget gate and, with `chrono_length`, the input gate."""
        super().reset_parameters()
        forget = self.forget_bias if self.chrono_length is None else self._chrono_bias(self.chrono_length)
        self._set_bias(1, forget)
        if self.chrono_length is not None:
            self._set_bias(0, -forget)

    def _kernel(
        self, x: Tensor, batch_sizes: Tensor | None, carry: tuple[Tensor, ...], weights: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if batch_sizes is None:
            y, *last = torch.lstm(x, carry, weights, True, 1, 0.0, self.training, False, True)
        else:
            y, *last = torch.lstm(x, batch_sizes, carry, weights, True, 1, 0.0, self.training, False)
        return y, tuple(last)

    def _step(self, projected: Tensor, carry: tuple[Tensor, ...], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        h, c = carry
        i, f, g, o = (projected + functional.linear(h, weight, bias)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
