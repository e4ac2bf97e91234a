"""Additive decay as a fused CPU kernel, forward and backward.

A problem is a row of the batch and a block of channels. z_t - z_{t-1} is the softplus of x_t - z_{t-1}, and the share
its sigmoid: no maximum has to be carried along. z lives in the row where the last one is to be returned, its gradient
in the row of the state's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.additive_decay import parallel
from tidegate.ops.kernels import LANES, jit_views, wide_vectors
from tidegate.ops.vector import fill, load_some, sigmoid, softplus, store_some, where_negative
from tidegate.segments import Segments

NOTHING = np.float32(-1e30)  # stands for minus infinity, which has no difference to itself
HALFWAY = np.float32(5e29)
ZERO, ONE = np.float32(0.0), np.float32(1.0)


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit_views
def _forward(begin, end, block, x, codes, state, share, log_decay, last):
    time, width = x.shape[1], x.shape[2]
    blocks = (width + block - 1) // block
    for problem in range(begin, end):
        n, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, width)
        for c in range(lo, hi):
            last[n, c] = state[n, c]
        for t in range(time):
            code = codes[n, t] if codes.shape[0] > 0 else np.uint8(0)
            if code == 2:
                continue
            if code == 1:
                for c in range(lo, hi):
                    last[n, c] = NOTHING
            _token((n * time + t) * width + lo, n * width + lo, hi - lo, x, share, log_decay, last)


@jit_views
def _token(at, row, width, x, share, log_decay, z):
    wide_vectors()
    zero, one, halfway = fill(ZERO), fill(ONE), fill(HALFWAY)
    for c in range(0, width, LANES):
        some = min(LANES, width - c)
        xt, past = load_some(x, at + c, some), load_some(z, row + c, some)
        empty = past + halfway  # is negative where nothing came before
        ahead = xt - past
        grows = softplus(ahead)
        store_some(share, at + c, where_negative(empty, one, sigmoid(ahead)), some)
        store_some(log_decay, at + c, where_negative(empty, zero, zero - grows), some)
        store_some(z, row + c, where_negative(empty, xt, past + grows), some)


@jit_views
def _backward(begin, end, block, share, codes, state, dshare, dlog_decay, dlast, dx, dstate):
    time, width = share.shape[1], share.shape[2]
    blocks = (width + block - 1) // block
    for problem in range(begin, end):
        n, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, width)
        for c in range(lo, hi):
            dstate[n, c] = dlast[n, c]
        first = 0
        while codes.shape[0] > 0 and first < time and codes[n, first] == 2:
            first += 1
        for t in range(time - 1, -1, -1):
            code = codes[n, t] if codes.shape[0] > 0 else np.uint8(0)
            if code == 2:
                continue
            at, row = (n * time + t) * width + lo, n * width + lo
            _token_backward(at, row, hi - lo, t == first, code == 1, share, state, dshare, dlog_decay, dx, dstate)


@jit_views
def _token_backward(at, row, width, first, starts, share, state, dshare, dlog_decay, dx, dz):
    wide_vectors()
    one, halfway = fill(ONE), fill(HALFWAY)
    for c in range(0, width, LANES):
        some = min(LANES, width - c)
        p, flow = load_some(share, at + c, some), load_some(dz, row + c, some)
        back = p * (load_some(dshare, at + c, some) * (one - p) + flow - load_some(dlog_decay, at + c, some))
        if starts:  # share 1 and decay 0 are constants there, and z is x
            back = flow
        elif first:
            back = where_negative(load_some(state, row + c, some) + halfway, flow, back)
        store_some(dx, at + c, back, some)
        store_some(dz, row + c, flow - back, some)


# -- operators ---------------------------------------------------------------------------------------------------------
def additive_decay(x: Tensor, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, D), state (B, D), float32."""
    share, log_decay, last = _call(x, state, None if segments is None else segments.codes())
    return share, log_decay, last


def _run(kernel: Any, x: Tensor, codes: Tensor | None, state: Tensor, *arguments: Tensor) -> None:
    batch, _, width = x.shape
    block = kernels.block(width, batch)
    flags = np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)
    given = [kernels.array(tensor) for tensor in (x, state.clamp(min=float(NOTHING)), *arguments)]
    kernels.run(kernel, batch * -(-width // block), block, given[0], flags, *given[1:])


@torch.library.custom_op("tidegate::additive_decay", mutates_args=(), device_types="cpu")
def _forward_op(x: Tensor, state: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    share, log_decay = ((torch.empty if codes is None else torch.zeros)(x.shape) for _ in range(2))
    last = torch.empty(state.shape)
    _run(_forward, x, codes, state, share, log_decay, last)
    return share, log_decay, torch.where(last < -float(HALFWAY), -torch.inf, last)


@torch.library.custom_op("tidegate::additive_decay_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    share: Tensor, state: Tensor, codes: Tensor | None, dshare: Tensor, dlog_decay: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dstate = (torch.empty if codes is None else torch.zeros)(share.shape), torch.empty(state.shape)
    _run(_backward, share, codes, state, dshare, dlog_decay, dlast, dx, dstate)
    return dx, dstate


@_forward_op.register_fake
def _(x, state, codes):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(state.shape)


@_backward_op.register_fake
def _(share, state, codes, dshare, dlog_decay, dlast):
    return share.new_empty(share.shape), share.new_empty(state.shape)


def _setup_context(ctx, inputs, output):
    x, state, codes = inputs
    ctx.save_for_backward(x, state, codes, output[0])


def _backward_formula(ctx, dshare, dlog_decay, dlast):
    x, state, codes, share = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: only the PyTorch form has one
        segments = None if codes is None else Segments(codes == 1, codes != 2)
        gradients = kernels.differentiable_gradients(
            lambda x, z: parallel.additive_decay(x, z, segments), [x, state], (dshare, dlog_decay, dlast)
        )
        return *gradients, None
    return *_call_backward(share, state, codes, dshare, dlog_decay, dlast), None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
_call, _call_backward = kernels.direct(_forward_op, _setup_context, _backward_formula), kernels.direct(_backward_op)
