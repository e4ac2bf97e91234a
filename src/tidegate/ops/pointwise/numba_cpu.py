"""The same as fused CPU kernels. A problem is a block of rows, a row being the channels of one token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import exp32, inline, jit_views, wide_vectors
from tidegate.ops.pointwise import parallel

BLOCK = 32  # rows of one problem
ONE, ZERO = np.float32(1.0), np.float32(0.0)


# -- SwiGLU ------------------------------------------------------------------------------------------------------------
@jit_views
def _swiglu(begin, end, x, y):
    wide_vectors()
    width = y.shape[1]
    for n in range(begin * BLOCK, min(end * BLOCK, y.shape[0])):
        gate, up, out = x[n, :width], x[n, width:], y[n]
        for j in range(width):
            out[j] = gate[j] * up[j] / (ONE + exp32(-gate[j]))


@jit_views
def _swiglu_backward(begin, end, x, dy, dx):
    wide_vectors()
    width = dy.shape[1]
    for n in range(begin * BLOCK, min(end * BLOCK, dy.shape[0])):
        gate, up, given, dgate, dup = x[n, :width], x[n, width:], dy[n], dx[n, :width], dx[n, width:]
        for j in range(width):
            dup[j] = ONE / (ONE + exp32(-gate[j]))
        for j in range(width):
            dgate[j] = given[j] * up[j] * dup[j] * (ONE + gate[j] * (ONE - dup[j]))
        for j in range(width):
            dup[j] *= given[j] * gate[j]


# -- elu + 1 -----------------------------------------------------------------------------------------------------------
@jit_views
def _elu(begin, end, x, stride, y):
    wide_vectors()
    width = y.shape[1]
    for n in range(begin * BLOCK, min(end * BLOCK, y.shape[0])):
        xn, out = x[n * stride : n * stride + width], y[n]
        for j in range(width):
            out[j] = exp32(xn[j]) if xn[j] < ZERO else xn[j] + ONE


@jit_views
def _elu_backward(begin, end, y, dy, dx):
    wide_vectors()
    for n in range(begin * BLOCK, min(end * BLOCK, y.shape[0])):
        yn, given, out = y[n], dy[n], dx[n]
        for j in range(out.shape[0]):
            out[j] = given[j] * min(yn[j], ONE)


# -- log sigmoid -------------------------------------------------------------------------------------------------------
@inline
def log_one_plus(e):
    """log(1 + e) for e in [0, 1]: 2 artanh(e / (2 + e)) by its series, whose argument is at most a third."""
    z = e / (np.float32(2.0) + e)
    s = z * z
    series = s * np.float32(1 / 13) + np.float32(1 / 11)
    series = series * s + np.float32(1 / 9)
    series = series * s + np.float32(1 / 7)
    series = series * s + np.float32(1 / 5)
    series = series * s + np.float32(1 / 3)
    return np.float32(2.0) * z * (series * s + ONE)


@jit_views
def _log_sigmoid(begin, end, x, bias, scale, y):
    wide_vectors()
    for n in range(begin * BLOCK, min(end * BLOCK, y.shape[0])):
        xn, out = x[n], y[n]
        for j in range(out.shape[0]):
            logit = xn[j] + bias[j]
            out[j] = scale * (min(logit, ZERO) - log_one_plus(exp32(-abs(logit))))


@jit_views
def _log_sigmoid_backward(begin, end, x, bias, scale, dy, dx, dbias):
    wide_vectors()
    for problem in range(begin, end):
        total = dbias[problem]
        for j in range(total.shape[0]):
            total[j] = ZERO
        for n in range(problem * BLOCK, min(problem * BLOCK + BLOCK, dx.shape[0])):
            xn, given, out = x[n], dy[n], dx[n]
            for j in range(out.shape[0]):
                out[j] = scale * given[j] / (ONE + exp32(xn[j] + bias[j]))
            for j in range(out.shape[0]):
                total[j] += out[j]


# -- rotation ----------------------------------------------------------------------------------------------------------
@jit_views
def _rotate(begin, end, x, stride, cos, sin, y):
    wide_vectors()
    time, heads, half = y.shape[1], y.shape[2], y.shape[3] // 2
    shared = cos.shape[0] == 1
    for n in range(begin * BLOCK, min(end * BLOCK, y.shape[0] * time)):
        b, t = n // time, n % time
        c, s = cos[0 if shared else b, t], sin[0 if shared else b, t]
        for h in range(heads):
            at = n * stride + h * 2 * half
            first, second = x[at : at + half], x[at + half : at + 2 * half]
            low, high = y[b, t, h, :half], y[b, t, h, half:]
            for j in range(half):
                low[j] = first[j] * c[j] - second[j] * s[j]
            for j in range(half):
                high[j] = second[j] * c[j] + first[j] * s[j]


# -- token mix ---------------------------------------------------------------------------------------------------------
@jit_views
def _mix(begin, end, x, shifted, row, y):
    wide_vectors()
    for n in range(begin * BLOCK, min(end * BLOCK, y.shape[0])):
        own, before, out = x[n], shifted[n], y[n]
        for j in range(out.shape[0]):
            out[j] = own[j] + (before[j] - own[j]) * row[j]


@jit_views
def _mix_backward(begin, end, x, shifted, row, dy, first, dx, dshifted, drow):
    """What one view adds to the gradients; the first sets them."""
    wide_vectors()
    for problem in range(begin, end):
        total = drow[problem]
        for j in range(total.shape[0]):
            total[j] = ZERO
        for n in range(problem * BLOCK, min(problem * BLOCK + BLOCK, dx.shape[0])):
            own, before, given, mine, theirs = x[n], shifted[n], dy[n], dx[n], dshifted[n]
            for j in range(total.shape[0]):
                total[j] += given[j] * (before[j] - own[j])
            if first:
                for j in range(total.shape[0]):
                    theirs[j] = given[j] * row[j]
                for j in range(total.shape[0]):
                    mine[j] = given[j] * (ONE - row[j])
            else:
                for j in range(total.shape[0]):
                    theirs[j] += given[j] * row[j]
                for j in range(total.shape[0]):
                    mine[j] += given[j] * (ONE - row[j])


# -- operators ---------------------------------------------------------------------------------------------------------
def _rows(x: Tensor) -> np.ndarray:
    return kernels.array(x).reshape(-1, x.shape[-1])


def _run(kernel: Any, rows: int, *arguments: Any) -> None:
    kernels.run(kernel, -(-rows // BLOCK), *arguments)


def _operator(name: str) -> Any:
    return torch.library.custom_op(f"tidegate::{name}", mutates_args=(), device_types="cpu")


@_operator("swiglu")
def swiglu(x: Tensor) -> Tensor:
    y = torch.empty(*x.shape[:-1], x.shape[-1] // 2)
    _run(_swiglu, y.numel() // y.shape[-1], _rows(x), _rows(y))
    return y.to(x.dtype)


@_operator("swiglu_backward")
def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty(x.shape)
    _run(_swiglu_backward, dy.numel() // dy.shape[-1], _rows(x), _rows(dy), _rows(dx))
    return dx.to(x.dtype)


@swiglu.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@swiglu_backward.register_fake
def _(x, dy):
    return x.new_empty(x.shape)


_call_swiglu_backward = kernels.direct(swiglu_backward)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_formula(ctx, dy):
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        return kernels.differentiable_gradients(lambda x: (parallel.swiglu(x),), [x], (dy,))[0]
    return _call_swiglu_backward(x, dy)


swiglu.register_autograd(_swiglu_formula, setup_context=_swiglu_setup)


@_operator("elu_plus_one")
def elu_plus_one(x: Tensor) -> Tensor:
    y = torch.empty(x.shape)
    width = x.shape[-1] * (x.shape[-2] if x.ndim > 3 else 1)
    _run(_elu, x.numel() // width, *kernels.rows(x, width), y.numpy().reshape(-1, width))
    return y.to(x.dtype)


@_operator("elu_plus_one_backward")
def elu_plus_one_backward(y: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty(y.shape)
    _run(_elu_backward, y.numel() // y.shape[-1], _rows(y), _rows(dy), _rows(dx))
    return dx.to(y.dtype)


@elu_plus_one.register_fake
def _(x):
    return x.new_empty(x.shape)


@elu_plus_one_backward.register_fake
def _(y, dy):
    return y.new_empty(y.shape)


_call_elu_plus_one_backward = kernels.direct(elu_plus_one_backward)


def _elu_setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _elu_formula(ctx, dy):
    (y,) = ctx.saved_tensors
    return dy * y.clamp(max=1) if torch.is_grad_enabled() else _call_elu_plus_one_backward(y, dy)


elu_plus_one.register_autograd(_elu_formula, setup_context=_elu_setup)


@_operator("log_sigmoid")
def log_sigmoid(x: Tensor, bias: Tensor, scale: float) -> Tensor:
    y = torch.empty(x.shape)
    _run(_log_sigmoid, x.numel() // x.shape[-1], _rows(x), kernels.array(bias), np.float32(scale), _rows(y))
    return y


@_operator("log_sigmoid_backward")
def log_sigmoid_backward(x: Tensor, bias: Tensor, scale: float, dy: Tensor) -> tuple[Tensor, Tensor]:
    own = _rows(x)
    dx, dbias = torch.empty(x.shape), torch.empty(-(-own.shape[0] // BLOCK), own.shape[1])
    inputs = own, kernels.array(bias), np.float32(scale), _rows(dy)
    _run(_log_sigmoid_backward, own.shape[0], *inputs, _rows(dx), dbias.numpy())
    return dx.to(x.dtype), dbias.sum(0).to(bias.dtype)


@log_sigmoid.register_fake
def _(x, bias, scale):
    return x.new_empty(x.shape, dtype=torch.float32)


@log_sigmoid_backward.register_fake
def _(x, bias, scale, dy):
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


_call_log_sigmoid_backward = kernels.direct(log_sigmoid_backward)


def _log_sigmoid_setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _log_sigmoid_formula(ctx, dy):
    inputs = [*ctx.saved_tensors]
    if torch.is_grad_enabled():
        found = kernels.differentiable_gradients(lambda *x: (parallel.log_sigmoid(*x, ctx.scale),), inputs, (dy,))
        return (*found, None)
    return (*_call_log_sigmoid_backward(*inputs, ctx.scale, dy), None)


log_sigmoid.register_autograd(_log_sigmoid_formula, setup_context=_log_sigmoid_setup)


@_operator("rotate")
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty(x.shape)
    rows = x.shape[0] * x.shape[1]
    _run(_rotate, rows, *kernels.rows(x, x.shape[2] * x.shape[3]), kernels.array(cos), kernels.array(sin), y.numpy())
    return y.to(x.dtype)


@rotate.register_fake
def _(x, cos, sin):
    return x.new_empty(x.shape)


def _rotate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _rotate_back(ctx, dy):
    cos, sin = ctx.saved_tensors
    return direct.rotate(dy, cos, -sin), None, None  # linear in x: its own second derivative


rotate.register_autograd(_rotate_back, setup_context=_rotate_setup)


@_operator("token_mix")
def token_mix(x: Tensor, shifted: Tensor, mix: Tensor) -> list[Tensor]:
    views = [torch.empty(x.shape) for _ in mix]
    own, before = _rows(x), _rows(shifted)
    for row, view in zip(kernels.array(mix), views, strict=True):
        _run(_mix, own.shape[0], own, before, row, _rows(view))
    return [view.to(x.dtype) for view in views]


@_operator("token_mix_backward")
def token_mix_backward(
    x: Tensor, shifted: Tensor, mix: Tensor, upstream: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    own, before, weights = _rows(x), _rows(shifted), kernels.array(mix)
    dx, dshifted = torch.empty(x.shape), torch.empty(x.shape)
    dmix = torch.empty(len(mix), -(-own.shape[0] // BLOCK), mix.shape[1])
    for m, dy in enumerate(upstream):
        results = _rows(dx), _rows(dshifted), dmix[m].numpy()
        _run(_mix_backward, own.shape[0], own, before, weights[m], _rows(dy), m == 0, *results)
    return dx.to(x.dtype), dshifted.to(x.dtype), dmix.sum(1).to(x.dtype)


@token_mix.register_fake
def _(x, shifted, mix):
    return [x.new_empty(x.shape) for _ in range(mix.shape[0])]


@token_mix_backward.register_fake
def _(x, shifted, mix, upstream):
    return x.new_empty(x.shape), x.new_empty(x.shape), mix.new_empty(mix.shape)


_call_token_mix_backward = kernels.direct(token_mix_backward)


def _mix_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _mix_formula(ctx, upstream):
    inputs = [*ctx.saved_tensors]
    upstream = [torch.zeros_like(inputs[0]) if dy is None else dy for dy in upstream]
    if torch.is_grad_enabled():
        return (*kernels.differentiable_gradients(parallel.token_mix, inputs, upstream),)
    return _call_token_mix_backward(*inputs, upstream)


token_mix.register_autograd(_mix_formula, setup_context=_mix_setup)


class direct:
    """What eager code calls (see `kernels.direct`)."""

    swiglu = staticmethod(kernels.direct(swiglu, _swiglu_setup, _swiglu_formula))
    elu_plus_one = staticmethod(kernels.direct(elu_plus_one, _elu_setup, _elu_formula))
    log_sigmoid = staticmethod(kernels.direct(log_sigmoid, _log_sigmoid_setup, _log_sigmoid_formula))
    rotate = staticmethod(kernels.direct(rotate, _rotate_setup, _rotate_back))
    token_mix = staticmethod(token_mix)  # an autograd function returns no list
