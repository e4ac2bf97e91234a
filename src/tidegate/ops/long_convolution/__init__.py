"""Depthwise convolutions with filters as long as the sequence: causal with a state, and in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.ops.slots import append
from tidegate.segments import Segments, zero_padding

__all__ = ["long_convolution", "two_sided_convolution"]

Past = tuple[Tensor, Tensor]


@recurrence
def long_convolution(
    x: Tensor, filter: Tensor, *, state: Past | None = None, segments: Segments | None = None
) -> tuple[Tensor, Past]:
    """Every channel is filtered with taps for everything so far, channel by channel.

        y_t = sum_s filter[:, p_t - p_s] * x_s      over s <= t of the same document, p the position in it

    Positions count real tokens: padding lies between no two of them. Whole sequences go through an FFT, in
    O(T log T); few tokens after a long past, or short documents, are summed up term by term.

    Shapes: x, y (B, T, D), T >= 1, real; filter (D, S) with one tap for each of the L + T tokens that the state and x
    can hold, or more. y has the dtype of x and is zero on padding; half precision is computed in float32.

    The state is `(inputs, length)`: inputs (B, L, D) in the dtype of x, length (B,) int64, the number of tokens the
    current document has had. The token at position p lies in slot p, slots without a token are zero, and L grows by T
    with each call.

    Raises ValueError for tensors whose shapes or dtypes do not fit together.

    Source: Hyena, arXiv 2302.10866.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> taps = torch.tensor([[1.0, 10.0, 100.0]])
    >>> y, state = long_convolution(x[:, :2], taps)
    >>> y.flatten().tolist(), long_convolution(x[:, 2:], taps, state=state)[0].flatten().tolist()
    ([1.0, 12.0], [123.0])
    """
    _check(x, filter, "filter", x.shape[1] if state is None else _slots(x, state) + x.shape[1])
    batch, time, dim = x.shape
    x = zero_padding(x, segments)
    past, length = (None, None) if state is None else (state[0].to(x.dtype), state[1])
    (inputs,), new_length = append((x,), None if past is None else (past,), length, segments)
    slots = 0 if past is None else past.shape[1]
    wide, form = _wide(x.dtype), choose(x)
    if past is None or length is None:
        past, length = x.new_zeros(batch, 0, dim), new_length.new_zeros(batch)
    taps = filter.to(wide)[:, : slots + time]
    if form == "numba":
        from tidegate.ops.long_convolution.numba_cpu import long_convolution as implementation

        y = implementation(x.to(wide), past.to(wide), length, taps, segments)
    elif form == "reference" and not (torch.compiler.is_exporting() and segments is None):
        from tidegate.ops.long_convolution.reference import long_convolution as implementation

        y = implementation(x.to(wide), past.to(wide), length, taps, segments)
    elif segments is None:  # which exports in one piece; the new state has every token at its position
        from tidegate.ops.long_convolution.parallel import along_positions

        y = along_positions(inputs.to(wide), taps, None if state is None else length, time)
    else:
        from tidegate.ops.long_convolution.parallel import among_documents

        y = among_documents(x.to(wide), past.to(wide), length, taps, segments)
    return zero_padding(y.to(x.dtype), segments), (inputs, new_length)


def two_sided_convolution(x: Tensor, filter: Tensor, future: Tensor) -> Tensor:
    """Every channel is filtered along the whole sequence, with taps for what was and for what comes.

        y_t = sum_{s <= t} filter[:, t - s] * x_s + sum_{s > t} future[:, s - t - 1] * x_s

    For sequences that are there as a whole, such as the rows of an image; there is no state, and no padding.

    Shapes: x, y (B, T, D), T >= 1, real; filter (D, T or more), future (D, T - 1 or more). y has the dtype of x.
    Raises ValueError for tensors whose shapes or dtypes do not fit together.

    Source: the two-sided kernels of S4ND, arXiv 2210.06583.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> two_sided_convolution(x, torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[10.0, 100.0]])).flatten().tolist()
    [321.0, 32.0, 3.0]
    """
    _check(x, filter, "filter", x.shape[1])
    _check(x, future, "future", x.shape[1] - 1)
    time, form, wide = x.shape[1], choose(x), _wide(x.dtype)
    filter, future = filter.to(wide)[:, :time], future.to(wide)[:, : time - 1]
    if form == "numba":
        from tidegate.ops.long_convolution.numba_cpu import two_sided_convolution as implementation
    elif form == "reference":
        from tidegate.ops.long_convolution.reference import two_sided_convolution as implementation
    else:
        from tidegate.ops.long_convolution.parallel import two_sided_convolution as implementation
    return implementation(x.to(wide), filter, future).to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _check(x: Tensor, taps: Tensor, name: str, count: int) -> None:
    if x.ndim != 3 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"x: seen {x.dtype} {tuple(x.shape)}, wanted real numbers (batch, time, dim) with at least one token"
        )
    if taps.ndim != 2 or taps.shape[0] != x.shape[2] or taps.shape[1] < count or not taps.is_floating_point():
        raise ValueError(
            f"{name}: seen {taps.dtype} {tuple(taps.shape)}, wanted real numbers (dim={x.shape[2]}, {count} or more)"
        )


def _slots(x: Tensor, state: Past) -> int:
    """How many slots the state has, after its checks."""
    if len(state) != 2:
        raise ValueError(f"state: seen {len(state)} entries, wanted (inputs, length)")
    inputs, length = state
    if inputs.ndim != 3 or inputs.shape[0] != x.shape[0] or inputs.shape[2] != x.shape[2]:
        raise ValueError(f"state: its inputs have shape {tuple(inputs.shape)}, wanted ({x.shape[0]}, L, {x.shape[2]})")
    if tuple(length.shape) != (x.shape[0],) or length.dtype != torch.int64:
        raise ValueError(
            f"state: its length is {length.dtype} {tuple(length.shape)}, wanted one int64 per row of {x.shape[0]}"
        )
    return inputs.shape[1]
