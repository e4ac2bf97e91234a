"""The selective state space recurrence of Mamba: discretisation, scan and read-out in one."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.segments import Segments, zero_padding

__all__ = ["selective_scan"]


@recurrence
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    negative_eigenvalues: bool = False,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel keeps N numbers, forgets them at its own pace, and is read out by the token.

        h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t,     y_t = <c_t, h_t>          for each channel, h_t and a in R^N

    Three things that surround it cost next to nothing inside its kernels and are therefore options: a skip connection
    (`d`: y_t + d x_t), an output gate (`z`: the result times silu(z_t)), and the map that makes the step size positive
    (`dt_bias`: softplus(dt_t + dt_bias) takes the place of dt_t, which must be >= 0 without it). With
    `negative_eigenvalues` the decay is 2 exp(dt_t a) - 1, from (-1, 1), arXiv 2411.12537.

    Shapes: x, dt, z, y (B, T, D), T >= 1; a (D, N), negative; b, c (B, T, N); d, dt_bias (D,); `state`, the h before
    the first token, and the returned one (B, D, N), float32 for half precision, which is computed in float32. y has the
    dtype of x. The first token of a document sees h_{t-1} = 0; padding is stepped over and its y is zero. Memory grows
    with B T (D + N), for training too, never with B T D N.

    Raises ValueError for tensors whose shapes or dtypes do not fit together.

    Source: Mamba, arXiv 2312.00752, section 3.2; b is discretised by the simple rule of its code.

    >>> one = torch.ones(1, 3, 1)
    >>> y, state = selective_scan(one, one, torch.tensor([[0.5]]).log(), one, one)
    >>> y.flatten().tolist(), state.shape
    ([1.0, 1.5, 1.75], torch.Size([1, 1, 1]))
    """
    _check(x, dt, a, b, c, d, dt_bias, z, state)
    zero_padding(x[:, :, :0], segments)  # only the check of shapes
    dtype = x.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    state = x.new_zeros(x.shape[0], *a.shape, dtype=wide) if state is None else state.to(wide)
    form = choose(x)
    if form == "numba":
        from tidegate.ops.selective_scan.numba_cpu import selective_scan as implementation

        return implementation(x, dt, a, b, c, d, dt_bias, z, state, segments, negative_eigenvalues)
    if form == "reference":
        from tidegate.ops.selective_scan.reference import selective_scan as implementation
    else:
        from tidegate.ops.selective_scan.parallel import selective_scan as implementation
    x, dt, a, b, c = (tensor.to(wide) for tensor in (x, dt, a, b, c))
    d, dt_bias, z = (None if tensor is None else tensor.to(wide) for tensor in (d, dt_bias, z))
    y, state = implementation(x, dt, a, b, c, d, dt_bias, z, state, segments, negative_eigenvalues)
    return y.to(dtype), state


def _check(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (batch, time, dim)")
    batch, time, dim = x.shape
    if time == 0:
        raise ValueError("x: seen T = 0 tokens, wanted at least one")
    if a.ndim != 2 or a.shape[0] != dim or a.shape[1] == 0:
        raise ValueError(f"a: seen shape {tuple(a.shape)}, wanted (dim={dim}, states) with states >= 1")
    states = a.shape[1]
    wanted = {
        "dt": (dt, (batch, time, dim)),
        "b": (b, (batch, time, states)),
        "c": (c, (batch, time, states)),
        "d": (d, (dim,)),
        "dt_bias": (dt_bias, (dim,)),
        "z": (z, (batch, time, dim)),
        "state": (state, (batch, dim, states)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: seen shape {tuple(tensor.shape)}, wanted {shape} to go with x and a")
    for name, tensor in (("x", x), ("a", a), *((name, tensor) for name, (tensor, _) in wanted.items())):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: seen dtype {tensor.dtype}, wanted a real floating-point one")
