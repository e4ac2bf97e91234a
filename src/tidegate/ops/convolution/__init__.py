"""Short causal depthwise convolutions over time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.segments import Segments, zero_padding

__all__ = ["short_convolution"]


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_{j < W} weight[:, W - 1 - j] * x_{t - j}, channel by channel.

    x_{t-j} is the j-th real token of the same document before t: the window skips padding, reaches into `state` where
    a document continues from an earlier call, and holds zeros before the start of a document.

    With `activation="silu"` y is replaced by silu(y).

    Shapes: x, y (B, T, D), T >= 1; weight (D, W), the last column on the current token; bias (D,); `state` and the
    returned tail (B, W - 1, D): the last W - 1 real inputs, oldest first, zeros where the document is younger. y has
    the dtype of x and is zero on padding; the tail has the dtype of x.

    Raises ValueError for tensors whose shapes or dtypes do not fit together, and for another activation.

    Source: the depthwise convolution of Mamba, arXiv 2312.00752, section 3.4, there with W = 4.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> y, tail = short_convolution(x, torch.tensor([[10.0, 1.0]]))
    >>> y.flatten().tolist(), tail.flatten().tolist()
    ([1.0, 12.0, 23.0], [3.0])
    >>> short_convolution(x, torch.tensor([[10.0, 1.0]]), state=tail)[0].flatten().tolist()
    [31.0, 12.0, 23.0]
    """
    _check(x, weight, bias, activation, state)
    batch, _, dim = x.shape
    width = weight.shape[1]
    # The window is as long as the input's numbers allow, so the tail is kept as the inputs themselves.
    state = x.new_zeros(batch, width - 1, dim) if state is None else state.to(x.dtype)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    # The parallel form has no loop over time, so that an exported program is best served by it too.
    form = "parallel" if torch.compiler.is_exporting() else choose(x)
    if form == "numba":
        from tidegate.ops.convolution.numba_cpu import short_convolution as implementation

        zero_padding(x[:, :, :0], segments)  # only the check of shapes: the kernel never reads padding
        return implementation(x, weight, bias, state, segments, activation == "silu")
    x = zero_padding(x, segments)
    if form == "reference":
        from tidegate.ops.convolution.reference import short_convolution as implementation
    else:
        from tidegate.ops.convolution.parallel import short_convolution as implementation
    return implementation(x, weight, bias, state, segments, activation == "silu")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (batch, time, dim)")
    batch, time, dim = x.shape
    if time == 0:
        raise ValueError("x: seen T = 0 tokens, wanted at least one")
    if not x.is_floating_point():
        raise ValueError(f"x: seen dtype {x.dtype}, wanted a real floating-point one")
    if weight.ndim != 2 or weight.shape[0] != dim or weight.shape[1] == 0:
        raise ValueError(f"weight: seen shape {tuple(weight.shape)}, wanted (dim={dim}, width) with width >= 1")
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"bias: seen shape {tuple(bias.shape)}, wanted (dim={dim},)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: seen {activation!r}, wanted 'silu' or None")
    if state is not None and state.shape != (batch, weight.shape[1] - 1, dim):
        raise ValueError(
            f"state: seen shape {tuple(state.shape)}, wanted (batch={batch}, width - 1={weight.shape[1] - 1}, "
            f"dim={dim}), the tail returned by an earlier call"
        )
