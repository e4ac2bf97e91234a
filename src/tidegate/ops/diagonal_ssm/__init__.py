"""Many small diagonal state space models side by side, one for each channel, that do not change with time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.segments import Segments, zero_padding

__all__ = ["diagonal_ssm"]


@recurrence
def diagonal_ssm(
    u: Tensor,
    decay: Tensor,
    weight: Tensor,
    *,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel keeps N complex numbers, turns and shrinks each by its own constant, and reads their weighted sum.

        h_t = decay * h_{t-1} + u_t,     y_t = Re sum_n weight_n h_t[n]                       for each channel

    The same as a convolution with the kernel K_s = Re sum_n weight_n decay_n^s. The fused kernels walk along time,
    which takes documents, padding and single tokens as they come; PyTorch's form is a convolution by FFT where there
    are no segments.

    Shapes: u, y (B, T, D), T >= 1, real; decay, weight (D, N), complex; `state`, the h before the first token, and the
    returned one (B, D, N), complex64 for half precision, which is computed in float32. y has the dtype of u. The first
    token of a document sees h_{t-1} = 0; padding is stepped over and its y is zero. |decay| <= 1 keeps h bounded.

    Raises ValueError for tensors whose shapes or dtypes do not fit together.

    Source: S4D, arXiv 2206.11893.

    >>> half, one = torch.full((1, 1), 0.5 + 0j), torch.ones(1, 1, dtype=torch.complex64)
    >>> y, state = diagonal_ssm(torch.tensor([[[4.0], [2.0], [1.0]]]), half, one)
    >>> y.flatten().tolist(), state.real.tolist()
    ([4.0, 4.0, 3.0], [[[3.0]]])
    """
    if u.ndim != 3 or u.shape[1] == 0 or not u.is_floating_point():
        raise ValueError(
            f"u: seen {u.dtype} {tuple(u.shape)}, wanted real numbers (batch, time, dim) with at least one token"
        )
    batch, _, dim = u.shape
    if decay.ndim != 2 or decay.shape[0] != dim or decay.shape[1] == 0 or not decay.is_complex():
        raise ValueError(f"decay: seen {decay.dtype} {tuple(decay.shape)}, wanted complex numbers (dim={dim}, states)")
    if weight.shape != decay.shape or not weight.is_complex():
        raise ValueError(f"weight: seen {weight.dtype} {tuple(weight.shape)}, wanted it complex, as decay")
    wanted = (batch, *decay.shape)
    if state is not None and (tuple(state.shape) != wanted or not state.is_complex()):
        raise ValueError(f"state: seen {state.dtype} {tuple(state.shape)}, wanted complex numbers {wanted}")
    zero_padding(u[:, :, :0], segments)  # only the check of shapes
    dtype, form = u.dtype, choose(u)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    numbers = torch.complex128 if wide == torch.float64 else torch.complex64
    u, decay, weight = u.to(wide), decay.to(numbers), weight.to(numbers)
    state = decay.new_zeros(wanted) if state is None else state.to(numbers)
    if form == "numba":
        from tidegate.ops.diagonal_ssm.numba_cpu import diagonal_ssm as implementation
    elif form == "reference":
        from tidegate.ops.diagonal_ssm.reference import diagonal_ssm as implementation
    else:
        from tidegate.ops.diagonal_ssm.parallel import diagonal_ssm as implementation
    y, state = implementation(u, decay, weight, state, segments)
    return y.to(dtype), state
