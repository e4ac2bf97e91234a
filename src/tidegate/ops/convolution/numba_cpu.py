"""Short causal depthwise convolution as fused CPU kernels, forward and backward, SiLU included.

A problem is a row of the batch and a block of channels. The kernels count the real tokens of a document, 0, 1, ..., so
that padding costs nothing in the inner loops; the tokens before it, -1, -2, ..., are the tail of the earlier call, or
zeros. The backward pass computes the convolution again where a SiLU follows it, rather than keep it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.convolution import parallel
from tidegate.ops.kernels import exp32, inline, jit, jit_views, wide_vectors
from tidegate.segments import Segments

ONE, ZERO = np.float32(1.0), np.float32(0.0)
BLOCK = 512  # channels: what is read again and again stays in the first-level cache
GROUP = 4  # tokens whose share of the weight's gradient is added in one pass


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, segments: Segments | None, silu: bool
) -> tuple[Tensor, Tensor]:
    codes = None if segments is None else segments.codes()
    return _call(x, weight, bias, state, codes, silu)


# -- kernels -----------------------------------------------------------------------------------------------------------
@inline
def _source(x, stride, state, tokens, continues, zeros, b, i, lo, hi):
    """Token i of the document, channels lo to hi."""
    if i >= 0:
        at = (b * tokens.shape[0] + tokens[i]) * stride
        row = x[at + lo : at + hi]
    elif continues:
        row = state[b, state.shape[1] + i, lo:hi]
    else:
        row = zeros[: hi - lo]
    return row


@jit_views
def _convolve(x, stride, weight, bias, state, tokens, continues, zeros, b, i, lo, hi, out):
    """out = bias + sum_k weight[W - 1 - k] x_{i - k}."""
    wide_vectors()
    width = weight.shape[0]
    offset = bias[lo:hi]
    x0 = _source(x, stride, state, tokens, continues, zeros, b, i, lo, hi)
    w0 = weight[width - 1, lo:hi]
    if width == 4:  # the usual case in one pass
        x1 = _source(x, stride, state, tokens, continues, zeros, b, i - 1, lo, hi)
        x2 = _source(x, stride, state, tokens, continues, zeros, b, i - 2, lo, hi)
        x3 = _source(x, stride, state, tokens, continues, zeros, b, i - 3, lo, hi)
        w1, w2, w3 = weight[2, lo:hi], weight[1, lo:hi], weight[0, lo:hi]
        for j in range(out.shape[0]):
            out[j] = offset[j] + x0[j] * w0[j] + x1[j] * w1[j] + x2[j] * w2[j] + x3[j] * w3[j]
        return
    for j in range(out.shape[0]):
        out[j] = offset[j] + x0[j] * w0[j]
    for k in range(1, width):
        xk, wk = _source(x, stride, state, tokens, continues, zeros, b, i - k, lo, hi), weight[width - 1 - k, lo:hi]
        for j in range(out.shape[0]):
            out[j] += xk[j] * wk[j]


@jit_views
def _silu(y):
    wide_vectors()
    for j in range(y.shape[0]):
        y[j] *= ONE / (ONE + exp32(-y[j]))


@jit_views
def _copy(x, out):
    for j in range(out.shape[0]):
        out[j] = x[j]


@jit_views
def _forward_problem(b, lo, hi, x, stride, weight, bias, state, codes, silu, y, tail, tokens, zeros):
    n, continues = 0, True
    for t in range(y.shape[1]):
        yt = y[b, t, lo:hi]
        code = codes[b, t] if codes.shape[0] > 0 else 0
        if code == 2:
            yt[:] = ZERO
            continue
        if code == 1:
            n, continues = 0, False
        tokens[n] = t
        _convolve(x, stride, weight, bias, state, tokens, continues, zeros, b, n, lo, hi, yt)
        if silu:
            _silu(yt)
        n += 1
    width = weight.shape[0]
    for m in range(width - 1):
        _copy(_source(x, stride, state, tokens, continues, zeros, b, n - (width - 1) + m, lo, hi), tail[b, m, lo:hi])


@jit
def _forward(begin, end, block, x, stride, weight, bias, state, codes, silu, y, tail):
    dim = y.shape[2]
    blocks = (dim + block - 1) // block
    tokens, zeros = np.empty(y.shape[1], np.int64), np.zeros(block, np.float32)
    for problem in range(begin, end):
        b, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, dim)
        _forward_problem(b, lo, hi, x, stride, weight, bias, state, codes, silu, y, tail, tokens, zeros)


@jit_views
def _through_silu(z, dy):
    """z = dy silu'(z)."""
    wide_vectors()
    for j in range(z.shape[0]):
        s = ONE / (ONE + exp32(-z[j]))
        z[j] = dy[j] * s * (ONE + z[j] * (ONE - s))


@jit_views
def _spread_back(recent, weight, i, lo, hi, out):
    """out = sum_k weight[W - 1 - k] dz_{i + k}: what token i is owed by itself and those after it."""
    wide_vectors()
    width, slots, size = weight.shape[0], recent.shape[0], hi - lo
    z0, w0 = recent[i % slots, :size], weight[width - 1, lo:hi]
    if width == 4:
        z1, z2, z3 = recent[(i + 1) % slots, :size], recent[(i + 2) % slots, :size], recent[(i + 3) % slots, :size]
        w1, w2, w3 = weight[2, lo:hi], weight[1, lo:hi], weight[0, lo:hi]
        for j in range(out.shape[0]):
            out[j] = z0[j] * w0[j] + z1[j] * w1[j] + z2[j] * w2[j] + z3[j] * w3[j]
        return
    for j in range(out.shape[0]):
        out[j] = z0[j] * w0[j]
    for k in range(1, width):
        zk, wk = recent[(i + k) % slots, :size], weight[width - 1 - k, lo:hi]
        for j in range(out.shape[0]):
            out[j] += zk[j] * wk[j]


@jit_views
def _add(x, out):
    wide_vectors()
    for j in range(out.shape[0]):
        out[j] += x[j]


@jit_views
def _add_products(x, z, out):
    wide_vectors()
    for j in range(out.shape[0]):
        out[j] += x[j] * z[j]


@jit_views
def _add_four_products(x0, x1, x2, x3, z0, z1, z2, z3, out):
    wide_vectors()
    for j in range(out.shape[0]):
        out[j] += x0[j] * z0[j] + x1[j] * z1[j] + x2[j] * z2[j] + x3[j] * z3[j]


@jit_views
def _backward_document(
    b, lo, hi, n, continues, last, x, stride, weight, bias, state, silu, dy, dtail, dx, dweight, dbias, dstate,
    tokens, zeros, recent,
):  # fmt: skip
    """A document of n tokens, oldest first. `recent` holds dz, the gradient before the SiLU, of the last few."""
    width, slots, size = weight.shape[0], recent.shape[0], hi - lo
    for slot in range(slots):
        recent[slot, :size] = ZERO
    doffset = dbias[b, lo:hi]
    for i in range(n + width - 1):
        z = recent[i % slots, :size]
        if i >= n:
            z[:] = ZERO
        else:
            dyi = dy[b, tokens[i], lo:hi]
            if silu:
                _convolve(x, stride, weight, bias, state, tokens, continues, zeros, b, i, lo, hi, z)
                _through_silu(z, dyi)
            else:
                _copy(dyi, z)
            _add(z, doffset)
        if i < n and i % GROUP == GROUP - 1:
            z1, z2, z3 = recent[(i - 1) % slots, :size], recent[(i - 2) % slots, :size], recent[(i - 3) % slots, :size]
            for k in range(width):
                x0 = _source(x, stride, state, tokens, continues, zeros, b, i - k, lo, hi)
                x1 = _source(x, stride, state, tokens, continues, zeros, b, i - k - 1, lo, hi)
                x2 = _source(x, stride, state, tokens, continues, zeros, b, i - k - 2, lo, hi)
                x3 = _source(x, stride, state, tokens, continues, zeros, b, i - k - 3, lo, hi)
                _add_four_products(x0, x1, x2, x3, z, z1, z2, z3, dweight[b, width - 1 - k, lo:hi])
        elif i < n and i >= n // GROUP * GROUP:  # the last few, which fill no group
            for k in range(width):
                xk = _source(x, stride, state, tokens, continues, zeros, b, i - k, lo, hi)
                _add_products(xk, z, dweight[b, width - 1 - k, lo:hi])
        target = i - (width - 1)  # no later token looks back at this one
        if target >= 0 or continues:
            out = dx[b, tokens[target], lo:hi] if target >= 0 else dstate[b, i, lo:hi]
            _spread_back(recent, weight, target, lo, hi, out)
            if last and target >= n - (width - 1):
                _add(dtail[b, target - n + width - 1, lo:hi], out)


@jit
def _backward(begin, end, block, x, stride, weight, bias, state, codes, silu, dy, dtail, dx, dweight, dbias, dstate):
    time, dim = dx.shape[1], dx.shape[2]
    blocks = (dim + block - 1) // block
    tokens, zeros = np.empty(time, np.int64), np.zeros(block, np.float32)
    recent = np.empty((max(weight.shape[0], GROUP), block), np.float32)
    for problem in range(begin, end):
        b, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, dim)
        dweight[b, :, lo:hi] = ZERO
        dbias[b, lo:hi] = ZERO
        dstate[b, :, lo:hi] = ZERO
        n, continues = 0, True
        for t in range(time + 1):
            code = 1 if t == time else codes[b, t] if codes.shape[0] > 0 else 0
            if code == 2:
                dx[b, t, lo:hi] = ZERO
                continue
            if code == 1:
                if n > 0 or t == time:
                    _backward_document(
                        b, lo, hi, n, continues, t == time, x, stride, weight, bias, state, silu, dy, dtail,
                        dx, dweight, dbias, dstate, tokens, zeros, recent,
                    )  # fmt: skip
                n, continues = 0, False
            if t < time:
                tokens[n] = t
                n += 1


# -- operators ---------------------------------------------------------------------------------------------------------
def _run(
    kernel: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, codes: Tensor | None, *rest
) -> None:
    dim = x.shape[2]
    block = min(kernels.block(dim, x.shape[0]), BLOCK)
    offset = np.zeros(dim, np.float32) if bias is None else kernels.array(bias)
    flags = np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)
    inputs = (*kernels.rows(x, dim), kernels.array(weight.t()), offset, kernels.array(state), flags)
    kernels.run(kernel, x.shape[0] * -(-dim // block), block, *inputs, *rest)


@torch.library.custom_op("tidegate::short_convolution", mutates_args=(), device_types="cpu")
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, codes: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    y, tail = torch.empty(x.shape), torch.empty(state.shape)
    _run(_forward, x, weight, bias, state, codes, silu, y.numpy(), tail.numpy())
    return y.to(x.dtype), tail.to(x.dtype)


@torch.library.custom_op("tidegate::short_convolution_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    silu: bool,
    dy: Tensor,
    dtail: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, dim = x.shape
    width = weight.shape[1]
    dx, dstate = torch.empty(x.shape), torch.empty(state.shape)
    dweight, dbias = torch.empty(batch, width, dim), torch.empty(batch, dim)
    upstream = kernels.array(dy), kernels.array(dtail)
    results = [z.numpy() for z in (dx, dweight, dbias, dstate)]
    _run(_backward, x, weight, bias, state, codes, silu, *upstream, *results)
    dtype = x.dtype
    return dx.to(dtype), dweight.sum(0).t().contiguous().to(dtype), dbias.sum(0).to(dtype), dstate.to(dtype)


@_forward_op.register_fake
def _(x, weight, bias, state, codes, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(
        state, memory_format=torch.contiguous_format
    )


@_backward_op.register_fake
def _(x, weight, bias, state, codes, silu, dy, dtail):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2]), state.new_empty(state.shape)


def _setup_context(ctx, inputs, output):
    x, weight, bias, state, codes, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, state, codes)


def _backward_formula(ctx, dy, dtail):
    x, weight, bias, state, codes = ctx.saved_tensors
    if torch.is_grad_enabled():
        segments = None if codes is None else Segments(codes == 1, codes != 2)

        def form(x, weight, bias, state):
            clean = x if segments is None else segments.zero_padding(x)
            return parallel.short_convolution(clean, weight, bias, state, segments, ctx.silu)

        return *kernels.differentiable_gradients(form, [x, weight, bias, state], (dy, dtail)), None, None
    dx, dweight, dbias, dstate = _call_backward(x, weight, bias, state, codes, ctx.silu, dy, dtail)
    return dx, dweight, None if bias is None else dbias, dstate, None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
_call, _call_backward = kernels.direct(_forward_op, _setup_context, _backward_formula), kernels.direct(_backward_op)
