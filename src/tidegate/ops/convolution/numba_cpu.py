"""Short causal depthwise convolution as fused CPU kernels, forward and backward.

A problem is a row of the batch and a block of channels. The kernels walk through time with a short list of where the
tokens of the window stand, so that padding and documents cost nothing in the inner loops: an entry k >= 0 is a token of
this call, _ZERO is the emptiness before a document, and _STATE - i is entry i of the tail of the earlier call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.convolution import parallel
from tidegate.segments import Segments

_ZERO, _STATE = -1, -2


def short_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    codes = None if segments is None else segments.codes()
    return _forward_op(x, weight, bias, state, codes)


# -- kernels -----------------------------------------------------------------------------------------------------------
@kernels.jit
def _fill(window, width):
    for k in range(width - 1):  # window[k] is the token k + 1 steps back
        window[k] = _STATE - (width - 2 - k)


@kernels.jit
def _forward(begin, end, block, x, weight, bias, state, codes, y, tail):
    time, dim = x.shape[1], x.shape[2]
    width = weight.shape[0]
    blocks = (dim + block - 1) // block
    window = np.empty(max(width - 1, 1), np.int64)
    masked = codes.shape[0] > 0
    for problem in range(begin, end):
        b, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, dim)
        offset = bias[lo:hi]
        newest = weight[width - 1, lo:hi]
        _fill(window, width)
        for t in range(time):
            yt = y[b, t, lo:hi]
            code = codes[b, t] if masked else 0
            if code == 2:
                yt[:] = np.float32(0.0)
                continue
            if code == 1:
                window[:] = _ZERO
            xt = x[b, t, lo:hi]
            if width == 4 and window[2] >= 0:  # the usual case in one pass
                x1, w1 = x[b, window[0], lo:hi], weight[2, lo:hi]
                x2, w2 = x[b, window[1], lo:hi], weight[1, lo:hi]
                x3, w3 = x[b, window[2], lo:hi], weight[0, lo:hi]
                for j in range(yt.shape[0]):
                    yt[j] = offset[j] + xt[j] * newest[j] + x1[j] * w1[j] + x2[j] * w2[j] + x3[j] * w3[j]
            else:
                for j in range(yt.shape[0]):
                    yt[j] = offset[j] + xt[j] * newest[j]
                for k in range(width - 1):
                    if window[k] != _ZERO:
                        source = x[b, window[k], lo:hi] if window[k] >= 0 else state[b, _STATE - window[k], lo:hi]
                        tap = weight[width - 2 - k, lo:hi]
                        for j in range(yt.shape[0]):
                            yt[j] += source[j] * tap[j]
            for k in range(width - 2, 0, -1):
                window[k] = window[k - 1]
            window[0] = t
        for k in range(width - 1):
            row = tail[b, width - 2 - k, lo:hi]
            if window[k] >= 0:
                row[:] = x[b, window[k], lo:hi]
            elif window[k] == _ZERO:
                row[:] = np.float32(0.0)
            else:
                row[:] = state[b, _STATE - window[k], lo:hi]


@kernels.jit
def _backward(begin, end, block, x, weight, state, codes, dy, dtail, dx, dweight, dbias, dstate):
    time, dim = x.shape[1], x.shape[2]
    width = weight.shape[0]
    blocks = (dim + block - 1) // block
    window = np.empty(max(width - 1, 1), np.int64)
    masked = codes.shape[0] > 0
    for problem in range(begin, end):
        b, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, dim)
        newest, dnewest, doffset = weight[width - 1, lo:hi], dweight[b, width - 1, lo:hi], dbias[b, lo:hi]
        dweight[b, :, lo:hi] = np.float32(0.0)
        dstate[b, :, lo:hi] = np.float32(0.0)
        doffset[:] = np.float32(0.0)
        _fill(window, width)
        for t in range(time):
            dxt = dx[b, t, lo:hi]
            code = codes[b, t] if masked else 0
            if code == 2:
                dxt[:] = np.float32(0.0)
                continue
            if code == 1:
                window[:] = _ZERO
            dyt, xt = dy[b, t, lo:hi], x[b, t, lo:hi]
            for j in range(dxt.shape[0]):
                dxt[j] = dyt[j] * newest[j]
            for j in range(dxt.shape[0]):
                dnewest[j] += dyt[j] * xt[j]
            for j in range(dxt.shape[0]):
                doffset[j] += dyt[j]
            for k in range(width - 1):
                if window[k] != _ZERO:
                    if window[k] >= 0:
                        source, dsource = x[b, window[k], lo:hi], dx[b, window[k], lo:hi]
                    else:
                        source = state[b, _STATE - window[k], lo:hi]
                        dsource = dstate[b, _STATE - window[k], lo:hi]
                    tap, dtap = weight[width - 2 - k, lo:hi], dweight[b, width - 2 - k, lo:hi]
                    for j in range(dxt.shape[0]):
                        dsource[j] += dyt[j] * tap[j]
                    for j in range(dxt.shape[0]):
                        dtap[j] += dyt[j] * source[j]
            for k in range(width - 2, 0, -1):
                window[k] = window[k - 1]
            window[0] = t
        for k in range(width - 1):
            if window[k] != _ZERO:
                row = dtail[b, width - 2 - k, lo:hi]
                dsource = dx[b, window[k], lo:hi] if window[k] >= 0 else dstate[b, _STATE - window[k], lo:hi]
                for j in range(row.shape[0]):
                    dsource[j] += row[j]


# -- operators ---------------------------------------------------------------------------------------------------------
def _no_codes() -> np.ndarray:
    return np.zeros((0, 0), np.uint8)


def _run(kernel: Any, x: Tensor, *arguments: np.ndarray) -> None:
    block = kernels.block(x.shape[2], x.shape[0])
    kernels.run(kernel, x.shape[0] * -(-x.shape[2] // block), block, kernels.array(x), *arguments)


@torch.library.custom_op("tidegate::short_convolution", mutates_args=(), device_types="cpu")
def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, tail = torch.empty(x.shape), torch.empty(state.shape)
    offset = torch.zeros(x.shape[2]) if bias is None else bias
    _run(
        _forward,
        x,
        kernels.array(weight.t()),
        kernels.array(offset),
        kernels.array(state),
        _no_codes() if codes is None else kernels.array(codes),
        y.numpy(),
        tail.numpy(),
    )
    return y.to(x.dtype), tail.to(x.dtype)


@torch.library.custom_op("tidegate::short_convolution_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    x: Tensor, weight: Tensor, state: Tensor, codes: Tensor | None, dy: Tensor, dtail: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, dim = x.shape
    width = weight.shape[1]
    dx, dstate = torch.empty(x.shape), torch.empty(state.shape)
    dweight, dbias = torch.empty(batch, width, dim), torch.empty(batch, dim)
    _run(
        _backward,
        x,
        kernels.array(weight.t()),
        kernels.array(state),
        _no_codes() if codes is None else kernels.array(codes),
        kernels.array(dy),
        kernels.array(dtail),
        dx.numpy(),
        dweight.numpy(),
        dbias.numpy(),
        dstate.numpy(),
    )
    dtype = x.dtype
    return dx.to(dtype), dweight.sum(0).t().contiguous().to(dtype), dbias.sum(0).to(dtype), dstate.to(dtype)


@_forward_op.register_fake
def _(x, weight, bias, state, codes):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(
        state, memory_format=torch.contiguous_format
    )


@_backward_op.register_fake
def _(x, weight, state, codes, dy, dtail):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2]), state.new_empty(state.shape)


def _setup_context(ctx, inputs, output):
    x, weight, bias, state, codes = inputs
    ctx.save_for_backward(x, weight, bias, state, codes)


def _backward_formula(ctx, dy, dtail):
    x, weight, bias, state, codes = ctx.saved_tensors
    if torch.is_grad_enabled():
        segments = None if codes is None else Segments(codes == 1, codes != 2)
        inputs = [x, weight, state] if bias is None else [x, weight, state, bias]
        clean = x if segments is None else segments.zero_padding(x)
        outputs = parallel.short_convolution(clean, weight, bias, state, segments)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        given = iter(torch.autograd.grad(outputs, wanted, (dy, dtail), create_graph=True, allow_unused=True))
        gradients = [next(given) if tensor.requires_grad else None for tensor in inputs]
        dx, dweight, dstate = gradients[:3]
        return dx, dweight, None if bias is None else gradients[3], dstate, None
    dx, dweight, dbias, dstate = _backward_op(x, weight, state, codes, dy, dtail)
    return dx, dweight, None if bias is None else dbias, dstate, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
