"""The simple recurrent unit: gates, recurrence and highway in one."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.segments import Segments, zero_padding

__all__ = ["sru"]


@recurrence
def sru(
    x: Tensor,
    projected: Tensor,
    bias: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 1.0,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """An elementwise recurrence whose gates may see the state, and a highway around it.

    Equation, with u, f and r the three thirds of `projected` and b, v the rows of `bias` and `weight`::

        f_t = sigmoid(f_t + v_f * c_{t-1} + b_f)        r_t = sigmoid(r_t + v_r * c_{t-1} + b_r)
        c_t = f_t * c_{t-1} + (1 - f_t) * u_t
        y_t = r_t * c_t + (1 - r_t) * alpha * x_t

    Without `weight` v = 0 and c is a linear scan. With it there is no form that is parallel in time: the kernel takes
    tokens one by one at no more cost, but PyTorch's form is a loop.

    Shapes: x, y (B, T, D), T >= 1; projected (B, T, 3 D); bias, weight (2, D), for f and then for r; `state`, the c
    before the first token, and the returned one (B, D). y has the dtype of x; half precision is computed in float32,
    and its state is float32. The first token of a document sees c_{t-1} = 0; padding is stepped over and its y is zero.

    Raises ValueError for tensors whose shapes do not fit together.

    Source: arXiv 1709.02755.

    >>> x, zeros = torch.zeros(1, 3, 1), torch.zeros(2, 1)  # gates at one half
    >>> sru(x, torch.tensor([8.0, 0.0, 0.0]).expand(1, 3, 3), zeros)[1].item()
    7.0
    """
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (batch, time, dim) with at least one token")
    batch, time, dim = x.shape
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "projected": (projected, (batch, time, 3 * dim)),
        "bias": (bias, (2, dim)),
        "weight": (weight, (2, dim)),
        "state": (state, (batch, dim)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: seen shape {tuple(tensor.shape)}, wanted {shape} with x {tuple(x.shape)}")
    zero_padding(x[:, :, :0], segments)  # only the check of shapes
    dtype, form = x.dtype, choose(x)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    x, projected, bias = x.to(wide), projected.to(wide), bias.to(wide)
    weight = None if weight is None else weight.to(wide)
    state = x.new_zeros(batch, dim) if state is None else state.to(wide)
    if form == "numba":
        from tidegate.ops.sru.numba_cpu import sru as implementation
    elif form == "reference":
        from tidegate.ops.sru.reference import sru as implementation
    else:
        from tidegate.ops.sru.parallel import sru as implementation
    y, state = implementation(x, projected, bias, weight, alpha, state, segments)
    return y.to(dtype), state
