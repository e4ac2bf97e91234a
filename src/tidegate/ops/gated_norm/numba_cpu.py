"""RMS norm and gate as fused CPU kernels, forward and backward.

A row is one token, all heads of it; a problem is a block of rows. Nothing but the inputs is kept for the backward pass:
with a row in the first-level cache its norm costs less to compute again than to store.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.gated_norm import parallel
from tidegate.ops.kernels import copy_floats, exp32, jit, jit_views, wide_vectors

BLOCK = 32  # rows of one problem: enough for its share of the weight's gradient to be little work to add up
ONE, ZERO, HUGE = np.float32(1.0), np.float32(0.0), np.float32(1e37)
NONE, SILU, SIGMOID = 0, 1, 2
KINDS = {"silu": SILU, "sigmoid": SIGMOID}


def gated_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, activation: str, norm_before_gate: bool
) -> Tensor:
    return _forward(x, gate, weight, eps, activation, norm_before_gate)


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit_views
def activate(kind, gate, sigmoids, factor):
    """factor = f(gate), and the sigmoids that its derivative needs too."""
    wide_vectors()
    for j in range(sigmoids.shape[0]):
        sigmoids[j] = ONE / (ONE + exp32(-gate[j]))
    if kind == SILU:
        times(gate, sigmoids, factor)
    else:
        copy_floats(sigmoids, 0, factor, 0, factor.shape[0])


@jit_views
def slope(kind, sigmoids, factor, dgate):
    """dgate *= f'(gate)."""
    wide_vectors()
    if kind == SILU:
        for j in range(dgate.shape[0]):
            dgate[j] *= sigmoids[j] + factor[j] * (ONE - sigmoids[j])
    else:
        for j in range(dgate.shape[0]):
            dgate[j] *= sigmoids[j] * (ONE - sigmoids[j])


@jit_views
def product(x, y):
    wide_vectors()
    total = ZERO
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@jit_views
def spread(value, row):
    for j in range(row.shape[0]):
        row[j] = value


@jit_views
def times(x, y, out):
    wide_vectors()
    for j in range(out.shape[0]):
        out[j] = x[j] * y[j]


@jit_views
def times_three(x, y, z, out):
    wide_vectors()
    for j in range(out.shape[0]):
        out[j] = x[j] * y[j] * z[j]


@jit_views
def inverse_root(x, eps):
    """1 / sqrt(mean x^2 + eps), also where the squares themselves are beyond float32."""
    wide_vectors()
    count = np.float32(x.shape[0])
    total = product(x, x)
    if not total > HUGE:
        return ONE / np.sqrt(total / count + eps)
    largest, total = ZERO, ZERO
    for j in range(x.shape[0]):
        largest = max(largest, abs(x[j]))
    for j in range(x.shape[0]):
        part = x[j] / largest
        total += part * part
    return ONE / (largest * np.sqrt(total / count))


@jit_views
def roots(x, value_dim, eps, root):
    """1 / sqrt(mean x^2 + eps) of each head, at each of its channels."""
    for lo in range(0, x.shape[0], value_dim):
        spread(inverse_root(x[lo : lo + value_dim], eps), root[lo : lo + value_dim])


@jit_views
def forward_row(x, gate, weight, kind, gate_first, value_dim, eps, y, scratch):
    wide_vectors()
    root, sigmoids, factor = scratch[0], scratch[1], scratch[2]
    if kind != NONE:
        activate(kind, gate, sigmoids, factor)
    if kind != NONE and gate_first:
        times(x, factor, y)
        roots(y, value_dim, eps, root)
        for j in range(y.shape[0]):
            y[j] *= root[j] * weight[j]
    else:
        roots(x, value_dim, eps, root)
        if kind != NONE:
            for j in range(y.shape[0]):
                y[j] = x[j] * root[j] * weight[j] * factor[j]
        else:
            times_three(x, root, weight, y)


@jit_views
def forward_rows(begin, end, x, strides, gate, weight, kind, gate_first, value_dim, eps, y, scratch):
    width = y.shape[1]
    for n in range(begin, end):
        at, gate_at = n * strides[0], n * strides[1]
        xn, gn = x[at : at + width], gate[gate_at : gate_at + width]
        forward_row(xn, gn, weight, kind, gate_first, value_dim, eps, y[n], scratch)


@jit
def forward_kernel(begin, end, x, strides, gate, weight, kind, gate_first, value_dim, eps, y):
    scratch = np.empty((3, y.shape[1]), np.float32)
    rows = min(end * BLOCK, y.shape[0])
    forward_rows(begin * BLOCK, rows, x, strides, gate, weight, kind, gate_first, value_dim, eps, y, scratch)


@jit_views
def backward_row(x, gate, weight, kind, gate_first, value_dim, eps, dy, dx, dgate, dweight, scratch):
    """z is what the norm divides, dz its gradient."""
    wide_vectors()
    root, sigmoids, factor, dz, z = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    if kind != NONE:
        activate(kind, gate, sigmoids, factor)
    gated_first, gated_last = kind != NONE and gate_first, kind != NONE and not gate_first
    if gated_first:
        times(x, factor, z)
        roots(z, value_dim, eps, root)
        times(dy, weight, dz)
    else:
        z = x
        roots(z, value_dim, eps, root)
        if gated_last:
            times_three(dy, weight, factor, dz)
        else:
            times(dy, weight, dz)
    if gated_last:
        for j in range(dweight.shape[0]):
            dweight[j] += dy[j] * factor[j] * z[j] * root[j]
        for j in range(dgate.shape[0]):
            dgate[j] = dy[j] * weight[j] * z[j] * root[j]
        slope(kind, sigmoids, factor, dgate)
    else:
        for j in range(dweight.shape[0]):
            dweight[j] += dy[j] * z[j] * root[j]
    for lo in range(0, x.shape[0], value_dim):
        hi = lo + value_dim
        r = root[lo]
        along = product(dz[lo:hi], z[lo:hi]) * r * r / np.float32(value_dim)
        own, source, target = dz[lo:hi], z[lo:hi], dx[lo:hi]
        for j in range(value_dim):
            target[j] = r * (own[j] - along * source[j])
    if gated_first:
        times(dx, x, dgate)
        slope(kind, sigmoids, factor, dgate)
        for j in range(dx.shape[0]):
            dx[j] *= factor[j]


@jit_views
def backward_rows(
    begin, end, x, strides, gate, weight, kind, gate_first, value_dim, eps, dy, dx, dgate, dweight, scratch
):  # fmt: skip
    rows, width = dx.shape
    for problem in range(begin, end):
        dw = dweight[problem]
        spread(ZERO, dw)
        for n in range(problem * BLOCK, min(problem * BLOCK + BLOCK, rows)):
            at, gate_at, dy_at = n * strides[0], n * strides[1], n * strides[2]
            xn, gn, dyn = x[at : at + width], gate[gate_at : gate_at + width], dy[dy_at : dy_at + width]
            dgn = dgate[n] if kind != NONE else dgate[0]
            backward_row(xn, gn, weight, kind, gate_first, value_dim, eps, dyn, dx[n], dgn, dw, scratch)


@jit
def backward_kernel(begin, end, x, strides, gate, weight, kind, gate_first, value_dim, eps, dy, dx, dgate, dweight):
    scratch = np.empty((5, dx.shape[1]), np.float32)
    backward_rows(
        begin, end, x, strides, gate, weight, kind, gate_first, value_dim, eps, dy, dx, dgate, dweight, scratch
    )  # fmt: skip


# -- operators ---------------------------------------------------------------------------------------------------------
def _width(x: Tensor, weight: Tensor | None) -> int:
    """Channels of a row: of all heads of a token where there are heads, (B, T, H, V)."""
    return x.shape[-1] * (x.shape[-2] if x.ndim > 3 or (weight is not None and weight.ndim == 2) else 1)


def _arguments(x, gate, weight, eps, activation, norm_before_gate, *upstream):
    """What both kernels take first."""
    width, kind = _width(x, weight), NONE if gate is None else KINDS[activation]
    flat = [kernels.rows(t, width) for t in (x, x if gate is None else gate, *upstream)]
    strides = np.array([stride for _, stride in flat], np.int64)
    row = np.ones(width, np.float32)
    if weight is not None:
        row[:] = np.resize(kernels.array(weight).reshape(-1), width)
    arguments = (flat[0][0], strides, flat[1][0], row, kind, int(not norm_before_gate), x.shape[-1], np.float32(eps))
    return arguments, [array for array, _ in flat[2:]], (x.numel() // width, width)


@torch.library.custom_op("tidegate::gated_norm", mutates_args=(), device_types="cpu")
def forward_op(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, activation: str, norm_before_gate: bool
) -> Tensor:
    arguments, _, shape = _arguments(x, gate, weight, eps, activation, norm_before_gate)
    y = torch.empty(x.shape, dtype=torch.float32)
    kernels.run(forward_kernel, -(-shape[0] // BLOCK), *arguments, y.numpy().reshape(shape))
    return y.to(x.dtype)


@torch.library.custom_op("tidegate::gated_norm_backward", mutates_args=(), device_types="cpu")
def backward_op(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    activation: str,
    norm_before_gate: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate (no elements without one) and weight."""
    arguments, (upstream,), shape = _arguments(x, gate, weight, eps, activation, norm_before_gate, dy)
    dx = torch.empty(x.shape, dtype=torch.float32)
    dgate = torch.empty(0 if gate is None else x.shape, dtype=torch.float32)
    problems = -(-shape[0] // BLOCK)
    partial = torch.empty(problems, shape[1])
    dg = np.empty((1, shape[1]), np.float32) if gate is None else dgate.numpy().reshape(shape)
    kernels.run(backward_kernel, problems, *arguments, upstream, dx.numpy().reshape(shape), dg, partial.numpy())
    dweight = torch.empty(0)
    if weight is not None:
        dweight = partial.sum(0).view(-1, *weight.shape).sum(0)
    return dx.to(x.dtype), dgate.to(x.dtype), dweight.to(x.dtype)


@forward_op.register_fake
def _(x, gate, weight, eps, activation, norm_before_gate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@backward_op.register_fake
def _(x, gate, weight, eps, activation, norm_before_gate, dy):
    shapes = (x.shape, 0 if gate is None else x.shape, 0 if weight is None else weight.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


def _setup(ctx, inputs, output):
    x, gate, weight, *ctx.options = inputs
    ctx.save_for_backward(x, gate, weight)


def _backward(ctx, dy):
    inputs = ctx.saved_tensors
    if torch.is_grad_enabled():
        found = kernels.differentiable_gradients(lambda *x: (parallel.gated_norm(*x, *ctx.options),), [*inputs], (dy,))
    else:
        found = _backward_kernels(*inputs, *ctx.options, dy)
    return (*(None if x is None else dx for x, dx in zip(inputs, found, strict=True)), None, None, None)


forward_op.register_autograd(_backward, setup_context=_setup)
_forward, _backward_kernels = kernels.direct(forward_op, _setup, _backward), kernels.direct(backward_op)
