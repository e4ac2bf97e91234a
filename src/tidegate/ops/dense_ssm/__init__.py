"""Many state space models side by side, one for each channel, with full matrices that do not change with time."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.segments import Segments, zero_padding

__all__ = ["dense_ssm"]


@recurrence
def dense_ssm(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel keeps N numbers, multiplies them by its own matrix, and reads M weighted sums.

        h_t = a h_{t-1} + b u_t,     y_t = c h_t                                               for each channel

    The same as a convolution with the kernel K_s = c a^s b. A token costs no product with `a`: in pieces of Q tokens, y
    is the triangular matrix of K_0 ... K_{Q-1} times u, plus c a^(t+1) times the state before the piece, and only from
    piece to piece a state is multiplied, by a^Q. Powers are made by squaring, log2 Q products of matrices per call and
    channel whatever the batch, and none for single tokens.

    Shapes: u (B, T, D), T >= 1, y (B, T, D, M), real; a (D, N, N), b (D, N), c (D, M, N); `state`, the h before the
    first token, and the returned one (B, D, N), float32 for half precision, which is computed in float32. y has the
    dtype of u. The first token of a document sees h_{t-1} = 0; padding is stepped over and its y is zero. h stays
    bounded where the powers of `a` do.

    Raises ValueError for tensors whose shapes or dtypes do not fit together.

    Source: LSSL, arXiv 2110.13985.

    >>> turn, one = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    >>> y, state = dense_ssm(torch.tensor([[[4.0], [0.0], [0.0]]]), turn, one, one[:, None])
    >>> y.flatten().tolist(), state.tolist()
    ([4.0, 0.0, -4.0], [[[-4.0, 0.0]]])
    """
    if u.ndim != 3 or u.shape[1] == 0:
        raise ValueError(f"u: seen shape {tuple(u.shape)}, wanted (batch, time, dim) with at least one token")
    batch, _, dim = u.shape
    if a.ndim != 3 or a.shape[0] != dim or a.shape[1] != a.shape[2] or a.shape[1] == 0:
        raise ValueError(f"a: seen shape {tuple(a.shape)}, wanted square matrices (dim={dim}, states, states)")
    states = a.shape[1]
    if b.shape != (dim, states):
        raise ValueError(f"b: seen shape {tuple(b.shape)}, wanted (dim={dim}, states={states})")
    if c.ndim != 3 or c.shape[0] != dim or c.shape[1] == 0 or c.shape[2] != states:
        raise ValueError(f"c: seen shape {tuple(c.shape)}, wanted (dim={dim}, outputs, states={states})")
    if state is not None and state.shape != (batch, dim, states):
        raise ValueError(f"state: seen shape {tuple(state.shape)}, wanted (batch={batch}, dim={dim}, states={states})")
    for name, x in (("u", u), ("a", a), ("b", b), ("c", c), ("state", state)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name}: seen {x.dtype}, wanted real numbers")
    zero_padding(u[:, :, :0], segments)  # only the check of shapes
    dtype, form = u.dtype, choose(u)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    u, a, b, c = u.to(wide), a.to(wide), b.to(wide), c.to(wide)
    state = a.new_zeros(batch, dim, states) if state is None else state.to(wide)
    if form == "numba":
        from tidegate.ops.dense_ssm.numba_cpu import dense_ssm as implementation
    elif form == "reference":
        from tidegate.ops.dense_ssm.reference import dense_ssm as implementation
    else:
        from tidegate.ops.dense_ssm.parallel import dense_ssm as implementation
    y, state = implementation(u, a, b, c, state, segments)
    return y.to(dtype), state
