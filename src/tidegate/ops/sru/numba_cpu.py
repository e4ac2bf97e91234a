"""The simple recurrent unit as fused CPU kernels, forward and backward.

A problem is a row of the batch and a block of channels. Forward keeps all c_t, of which backward needs the ones before;
the gates it computes again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import exp32, jit, wide_vectors
from tidegate.ops.sru import parallel
from tidegate.segments import Segments

ONE, ZERO = np.float32(1.0), np.float32(0.0)


def sru(
    x: Tensor,
    projected: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    alpha: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    codes = None if segments is None else segments.codes()
    return _forward_op(x, projected, bias, weight, state, codes, alpha)[:2]


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit
def _forward(begin, end, block, x, p, bias, weight, state, codes, alpha, y, c, last):
    wide_vectors()
    time, width = x.shape[1], x.shape[2]
    blocks = (width + block - 1) // block
    masked = codes.shape[0] > 0
    zeros = np.zeros(block, np.float32)
    for problem in range(begin, end):
        n, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, width)
        bf, br, vf, vr = bias[0, lo:hi], bias[1, lo:hi], weight[0, lo:hi], weight[1, lo:hi]
        before = state[n, lo:hi]
        for t in range(time):
            yt, ct = y[n, t, lo:hi], c[n, t, lo:hi]
            code = codes[n, t] if masked else 0
            if code == 2:
                yt[:], ct[:] = ZERO, ZERO
                continue
            if code == 1:
                before = zeros[: hi - lo]
            xt, u, f, r = x[n, t, lo:hi], p[n, t, 0, lo:hi], p[n, t, 1, lo:hi], p[n, t, 2, lo:hi]
            for j in range(ct.shape[0]):
                ct[j] = u[j] + (before[j] - u[j]) / (ONE + exp32(-(f[j] + bf[j] + vf[j] * before[j])))
            for j in range(yt.shape[0]):
                high = alpha * xt[j]
                yt[j] = high + (ct[j] - high) / (ONE + exp32(-(r[j] + br[j] + vr[j] * before[j])))
            before = ct
        last[n, lo:hi] = before


@jit
def _backward(begin, end, block, x, p, bias, weight, state, codes, alpha, c, dy, dlast, dx, dp, dparameters, dstate):
    wide_vectors()
    time, width = x.shape[1], x.shape[2]
    blocks = (width + block - 1) // block
    masked = codes.shape[0] > 0
    zeros = np.zeros(block, np.float32)
    for problem in range(begin, end):
        n, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, width)
        bf, br, vf, vr = bias[0, lo:hi], bias[1, lo:hi], weight[0, lo:hi], weight[1, lo:hi]
        dbf, dbr = dparameters[n, 0, lo:hi], dparameters[n, 1, lo:hi]
        dvf, dvr = dparameters[n, 2, lo:hi], dparameters[n, 3, lo:hi]
        flow = dstate[n, lo:hi]  # what comes from later tokens to c_t
        flow[:] = dlast[n, lo:hi]
        for t in range(time - 1, -1, -1):
            dxt, du, df, dr = dx[n, t, lo:hi], dp[n, t, 0, lo:hi], dp[n, t, 1, lo:hi], dp[n, t, 2, lo:hi]
            code = codes[n, t] if masked else 0
            if code == 2:
                dxt[:], du[:], df[:], dr[:] = ZERO, ZERO, ZERO, ZERO
                continue
            # The token before: the nearest real one, or the state, or nothing.
            earlier = t - 1
            while masked and earlier >= 0 and codes[n, earlier] == 2:
                earlier -= 1
            if code == 1:
                before = zeros[: hi - lo]
            elif earlier < 0:
                before = state[n, lo:hi]
            else:
                before = c[n, earlier, lo:hi]
            xt, ct, dyt = x[n, t, lo:hi], c[n, t, lo:hi], dy[n, t, lo:hi]
            u, f, r = p[n, t, 0, lo:hi], p[n, t, 1, lo:hi], p[n, t, 2, lo:hi]
            # 1. The gates.
            for j in range(df.shape[0]):
                df[j] = ONE / (ONE + exp32(-(f[j] + bf[j] + vf[j] * before[j])))
            for j in range(dr.shape[0]):
                dr[j] = ONE / (ONE + exp32(-(r[j] + br[j] + vr[j] * before[j])))
            # 2. Through the read-out, to x, c and r.
            for j in range(dxt.shape[0]):
                dxt[j] = dyt[j] * (ONE - dr[j]) * alpha
            for j in range(flow.shape[0]):
                flow[j] += dyt[j] * dr[j]
            for j in range(dr.shape[0]):
                dr[j] *= (ONE - dr[j]) * dyt[j] * (ct[j] - alpha * xt[j])
            # 3. Through the update, to u and f, and on to the c before.
            for j in range(du.shape[0]):
                du[j] = flow[j] * (ONE - df[j])
            for j in range(df.shape[0]):
                df[j] *= du[j] * (before[j] - u[j])
            for j in range(flow.shape[0]):
                flow[j] += df[j] * vf[j] + dr[j] * vr[j] - du[j]
            # 4. What all tokens add to.
            for j in range(dbf.shape[0]):
                dbf[j] += df[j]
            for j in range(dbr.shape[0]):
                dbr[j] += dr[j]
            for j in range(dvf.shape[0]):
                dvf[j] += df[j] * before[j]
            for j in range(dvr.shape[0]):
                dvr[j] += dr[j] * before[j]
            if code == 1:
                flow[:] = ZERO


# -- operators ---------------------------------------------------------------------------------------------------------
def _arguments(x: Tensor, projected: Tensor, bias: Tensor, weight: Tensor | None, state: Tensor, codes: Any) -> Any:
    p = kernels.array(projected).reshape(*x.shape[:2], 3, x.shape[2])
    v = np.zeros(tuple(bias.shape), np.float32) if weight is None else kernels.array(weight)
    flags = np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)
    return kernels.array(x), p, kernels.array(bias), v, kernels.array(state), flags


def _run(kernel: Any, x: np.ndarray, *arguments: Any) -> None:
    block = kernels.block(x.shape[2], x.shape[0])
    kernels.run(kernel, x.shape[0] * -(-x.shape[2] // block), block, x, *arguments)


@torch.library.custom_op("tidegate::sru", mutates_args=(), device_types="cpu")
def _forward_op(
    x: Tensor,
    projected: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last c, and all c."""
    y, last, c = torch.empty(x.shape), torch.empty(state.shape), torch.empty(x.shape)
    results = (y.numpy(), c.numpy(), last.numpy())
    _run(_forward, *_arguments(x, projected, bias, weight, state, codes), np.float32(alpha), *results)
    return y, last, c


@torch.library.custom_op("tidegate::sru_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    x: Tensor,
    projected: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    alpha: float,
    c: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, projected, bias and weight together (4, D), and state."""
    dx, dp, dstate = torch.empty(x.shape), torch.empty(projected.shape), torch.empty(state.shape)
    sums = torch.zeros(x.shape[0], 4, x.shape[2])
    given = (kernels.array(c), kernels.array(dy), kernels.array(dlast))
    results = (dx.numpy(), dp.numpy().reshape(*x.shape[:2], 3, x.shape[2]), sums.numpy(), dstate.numpy())
    _run(_backward, *_arguments(x, projected, bias, weight, state, codes), np.float32(alpha), *given, *results)
    return dx, dp, sums.sum(0), dstate


@_forward_op.register_fake
def _(x, projected, bias, weight, state, codes, alpha):
    return x.new_empty(x.shape), x.new_empty(state.shape), x.new_empty(x.shape)


@_backward_op.register_fake
def _(x, projected, bias, weight, state, codes, alpha, c, dy, dlast):
    sums = x.new_empty(4, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(projected.shape), sums, x.new_empty(state.shape)


def _setup_context(ctx, inputs, output):
    *tensors, codes, ctx.alpha = inputs
    ctx.save_for_backward(*tensors, codes, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # else one of zeros is made for the third output


def _backward_formula(ctx, dy, dlast, _):
    x, projected, bias, weight, state, codes, c = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dlast = torch.zeros_like(state) if dlast is None else dlast
    if not torch.is_grad_enabled():
        dx, dp, sums, dstate = _backward_op(x, projected, bias, weight, state, codes, ctx.alpha, c, dy, dlast)
        return dx, dp, sums[:2], None if weight is None else sums[2:], dstate, None, None
    segments = None if codes is None else Segments(codes == 1, codes != 2)

    def form(x, projected, bias, *rest):
        weight = rest[0] if len(rest) > 1 else None
        return parallel.sru(x, projected, bias, weight, ctx.alpha, rest[-1], segments)

    inputs = [x, projected, bias, *([] if weight is None else [weight]), state]
    found = kernels.differentiable_gradients(form, inputs, (dy, dlast))
    return *found[:3], None if weight is None else found[3], found[-1], None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
