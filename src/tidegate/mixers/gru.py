"""Gated recurrent unit, on PyTorch's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.nn.torch_cell import TorchCell
from tidegate.registry import register
from tidegate.segments import Segments


@register("gru", family="cell", paper="recurrent-cells", title="Gated recurrent unit", arxiv="1406.1078")
class GRU(TorchCell):
    """Gated recurrent unit (GRU), hidden size dim.

    Equation::

        r, z = sigmoid(W x_t + b + U h_{t-1} + b')
        n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + b'_n))            reset="after", as in cuDNN, PyTorch and Keras
        n = tanh(W_n x_t + b_n + U_n (r * h_{t-1}) + b'_n)            reset="before", as in the paper
        y_t = h_t = (1 - z) * n + z * h_{t-1}

    - z is what is kept; where a source has z and 1 - z swapped, negate its rows of the weights and biases.
    - Parameters, their order r, z, n and the two biases are those of torch.nn.GRU and GRUCell. Weights trained with one
      kind of reset are wrong for the other. PyTorch has no kernel for "before", which runs as a loop over time.
    - `forget_bias` is the bias of z at initialisation, exactly (one of PyTorch's two biases is zero): above 0 the cell
      starts by keeping. `chrono_length` instead draws log U(1, length - 1), for memories of up to that many tokens.

    Source: arXiv 1406.1078; chrono initialisation 1804.11188. Shapes: x, y (B, T, dim). State: h (dim).
    """

    gates, entries = 3, ("h",)

    def __init__(
        self,
        dim: int,
        *,
        reset: str = "after",
        forget_bias: float = 0.0,
        chrono_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.reset, self.forget_bias, self.chrono_length = dim, reset, forget_bias, chrono_length
        if reset not in ("after", "before"):
            raise ValueError(f"reset: seen {reset!r}, wanted 'after' or 'before'")
        if chrono_length is not None and chrono_length < 3:
            raise ValueError(f"chrono_length: seen {chrono_length}, wanted at least 3 tokens, or None")
        self._build(dim, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±dim^(-1/2) but for the bias of z."""
        super().reset_parameters()
        self._set_bias(1, self.forget_bias if self.chrono_length is None else self._chrono_bias(self.chrono_length))

    def _runs_as_loop(self, x: Tensor, segments: Segments | None) -> bool:
        return self.reset == "before" or super()._runs_as_loop(x, segments)

    def _kernel(
        self, x: Tensor, batch_sizes: Tensor | None, carry: tuple[Tensor, ...], weights: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,) = carry
        if batch_sizes is None:
            y, last = torch.gru(x, h, weights, True, 1, 0.0, self.training, False, True)
        else:
            y, last = torch.gru(x, batch_sizes, h, weights, True, 1, 0.0, self.training, False)
        return y, (last,)

    def _step(self, projected: Tensor, carry: tuple[Tensor, ...], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        (h,) = carry
        gates, candidate = projected.split([2 * self.dim, self.dim], -1)
        if self.reset == "before":
            recurrent = functional.linear(h, weight[: 2 * self.dim], bias[: 2 * self.dim])
            r, z = torch.sigmoid(gates + recurrent).chunk(2, -1)
            n = torch.tanh(candidate + functional.linear(r * h, weight[2 * self.dim :], bias[2 * self.dim :]))
        else:
            recurrent, own = functional.linear(h, weight, bias).split([2 * self.dim, self.dim], -1)
            r, z = torch.sigmoid(gates + recurrent).chunk(2, -1)
            n = torch.tanh(candidate + r * own)
        return (n + z * (h - n),)
