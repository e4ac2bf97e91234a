"""Diagonal state space models as fused CPU kernels, forward and backward.

A problem is a row of the batch and LANES channels, one in each lane of a vector. Time goes in windows of CHUNK
positions; within one, two states at a time walk over its real tokens, so that what is carried stays in registers.
Forward keeps the states at the windows' beginnings, from which backward computes those within once more.

Here complex numbers are two planes of real ones, and what belongs to channels has their axis last, filled up to whole
vectors: decay and weight (2, N, D), states (B, 2, N, D), N even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tidegate.ops import kernels
from tidegate.ops.diagonal_ssm import parallel
from tidegate.ops.kernels import LANES, jit, jit_views, wide_vectors
from tidegate.ops.selective_scan.sweeps import next_window
from tidegate.ops.vector import fill, load, load_some, store, store_some
from tidegate.segments import Segments

CHUNK = 32
ROW = CHUNK * LANES
# Rows of scratch, each a vector per token: what goes in, what comes out, its gradient, two states (real, imaginary).
U, Y, DY, H = 0, ROW, 2 * ROW, 3 * ROW
SCRATCH = 7 * ROW
ZERO = np.float32(0.0)


def diagonal_ssm(
    u: Tensor, decay: Tensor, weight: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    codes = None if segments is None else segments.codes()
    return _forward_op(u, decay, weight, state, codes)[:2]


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit_views
def _load(x, batch, channel, tokens, n, s, row):
    wide_vectors()
    time, dim = x.shape[1], x.shape[2]
    for i in range(n):
        at = (batch * time + tokens[i]) * dim + channel
        store(s, row + i * LANES, load_some(x, at, dim - channel))


@jit_views
def _store(s, row, batch, channel, tokens, n, x):
    wide_vectors()
    time, dim = x.shape[1], x.shape[2]
    for i in range(n):
        at = (batch * time + tokens[i]) * dim + channel
        store_some(x, at, load(s, row + i * LANES), dim - channel)


@jit_views
def _copy(x, source, y, target, states, width):
    """One vector of every state, both planes."""
    wide_vectors()
    for m in range(2 * states):
        store(y, target + m * width, load(x, source + m * width))


@jit_views
def _clear(s, row, n):
    wide_vectors()
    for i in range(n):
        store(s, row + i * LANES, fill(ZERO))


@jit_views
def _forwards(s, a, w, h, channel, at, states, width, ends, fresh, runs):
    """Y += Re w h, and the states after the window."""
    wide_vectors()
    plane = states * width
    for m in range(0, states, 2):
        first = m * width + channel
        second = first + width
        ar, ai, wr, wi = load(a, first), load(a, plane + first), load(w, first), load(w, plane + first)
        br, bi, vr, vi = load(a, second), load(a, plane + second), load(w, second), load(w, plane + second)
        hr, hi = load(h, at + first), load(h, at + plane + first)
        kr, ki = load(h, at + second), load(h, at + plane + second)
        i = 0
        for run in range(runs):
            if fresh[run]:
                hr, hi, kr, ki = fill(ZERO), fill(ZERO), fill(ZERO), fill(ZERO)
            while i < ends[run]:
                u = load(s, U + i * LANES)
                x, y = u + ar * hr - ai * hi, u + br * kr - bi * ki
                hi, ki = ar * hi + ai * hr, br * ki + bi * kr
                hr, kr = x, y
                out = load(s, Y + i * LANES) + wr * hr - wi * hi
                store(s, Y + i * LANES, out + (vr * kr - vi * ki))
                i += 1
        store(h, at + first, hr)
        store(h, at + plane + first, hi)
        store(h, at + second, kr)
        store(h, at + plane + second, ki)


@jit
def _forward(begin, end, u, a, w, codes, y, h, saved):
    wide_vectors()
    time, states, width = u.shape[1], a.shape[1], a.shape[2]
    groups, windows = width // LANES, (time + CHUNK - 1) // CHUNK
    s = np.empty(SCRATCH, np.float32)
    tokens, ends, fresh = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.uint8)
    for problem in range(begin, end):
        batch, channel = problem // groups, problem % groups * LANES
        at = batch * 2 * states * width
        for window in range(windows):
            kept = (batch * windows + window) * 2 * states * width
            _copy(h, at + channel, saved, kept + channel, states, width)
            low = window * CHUNK
            n, runs = next_window(codes, batch, low, min(low + CHUNK, time), tokens, ends, fresh)
            _load(u, batch, channel, tokens, n, s, U)
            _clear(s, Y, n)
            _forwards(s, a, w, h, channel, at, states, width, ends, fresh, runs)
            _store(s, Y, batch, channel, tokens, n, y)


@jit_views
def _backwards(s, a, w, h, kept, flow, da, dw, channel, at, states, width, ends, fresh, runs):
    """From h before the window and the gradient `flow` of h after it: Y += du, da, dw, and that of h before."""
    wide_vectors()
    plane = states * width
    for m in range(0, states, 2):
        first = m * width + channel
        second = first + width
        ar, ai, wr, wi = load(a, first), load(a, plane + first), load(w, first), load(w, plane + first)
        br, bi, vr, vi = load(a, second), load(a, plane + second), load(w, second), load(w, plane + second)
        hr, hi = load(h, kept + first), load(h, kept + plane + first)
        kr, ki = load(h, kept + second), load(h, kept + plane + second)
        # 1. Forward once more; H gets what each token found.
        er, ei = load(dw, at + first), load(dw, at + plane + first)
        fr, fi = load(dw, at + second), load(dw, at + plane + second)
        i = 0
        for run in range(runs):
            if fresh[run]:
                hr, hi, kr, ki = fill(ZERO), fill(ZERO), fill(ZERO), fill(ZERO)
            while i < ends[run]:
                now = H + i * LANES
                store(s, now, hr)
                store(s, now + ROW, hi)
                store(s, now + 2 * ROW, kr)
                store(s, now + 3 * ROW, ki)
                u, dy = load(s, U + i * LANES), load(s, DY + i * LANES)
                x, y = u + ar * hr - ai * hi, u + br * kr - bi * ki
                hi, ki = ar * hi + ai * hr, br * ki + bi * kr
                hr, kr = x, y
                er, ei, fr, fi = er + dy * hr, ei - dy * hi, fr + dy * kr, fi - dy * ki
                i += 1
        store(dw, at + first, er)
        store(dw, at + plane + first, ei)
        store(dw, at + second, fr)
        store(dw, at + plane + second, fi)
        # 2. Backward.
        gr, gi = load(flow, at + first), load(flow, at + plane + first)
        qr, qi = load(flow, at + second), load(flow, at + plane + second)
        er, ei = load(da, at + first), load(da, at + plane + first)
        fr, fi = load(da, at + second), load(da, at + plane + second)
        for back in range(runs):
            run = runs - 1 - back
            begin = ends[run - 1] if run > 0 else 0
            while i > begin:
                i -= 1
                now = H + i * LANES
                dy = load(s, DY + i * LANES)
                gr, gi, qr, qi = gr + dy * wr, gi - dy * wi, qr + dy * vr, qi - dy * vi
                store(s, Y + i * LANES, load(s, Y + i * LANES) + (gr + qr))
                hr, hi, kr, ki = load(s, now), load(s, now + ROW), load(s, now + 2 * ROW), load(s, now + 3 * ROW)
                er, ei = er + gr * hr + gi * hi, ei + gi * hr - gr * hi
                fr, fi = fr + qr * kr + qi * ki, fi + qi * kr - qr * ki
                x, y = ar * gr + ai * gi, br * qr + bi * qi
                gi, qi = ar * gi - ai * gr, br * qi - bi * qr
                gr, qr = x, y
            if fresh[run]:
                gr, gi, qr, qi = fill(ZERO), fill(ZERO), fill(ZERO), fill(ZERO)
        store(flow, at + first, gr)
        store(flow, at + plane + first, gi)
        store(flow, at + second, qr)
        store(flow, at + plane + second, qi)
        store(da, at + first, er)
        store(da, at + plane + first, ei)
        store(da, at + second, fr)
        store(da, at + plane + second, fi)


@jit
def _backward(begin, end, u, a, w, codes, saved, dy, du, da, dw, flow):
    wide_vectors()
    time, states, width = u.shape[1], a.shape[1], a.shape[2]
    groups, windows = width // LANES, (time + CHUNK - 1) // CHUNK
    s = np.empty(SCRATCH, np.float32)
    tokens, ends, fresh = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.uint8)
    for problem in range(begin, end):
        batch, channel = problem // groups, problem % groups * LANES
        at = batch * 2 * states * width
        for window in range(windows - 1, -1, -1):
            kept, low = (batch * windows + window) * 2 * states * width, window * CHUNK
            n, runs = next_window(codes, batch, low, min(low + CHUNK, time), tokens, ends, fresh)
            _load(u, batch, channel, tokens, n, s, U)
            _load(dy, batch, channel, tokens, n, s, DY)
            _clear(s, Y, n)
            _backwards(s, a, w, saved, kept, flow, da, dw, channel, at, states, width, ends, fresh, runs)
            _store(s, Y, batch, channel, tokens, n, du)


# -- operators ---------------------------------------------------------------------------------------------------------
def _planes(x: Tensor) -> Tensor:
    """(..., D, N) complex -> (..., 2, N, D) real, N even and D whole vectors."""
    planes = torch.view_as_real(x.detach().resolve_conj().resolve_neg()).movedim(-1, -3).transpose(-1, -2)
    states, dim = planes.shape[-2:]
    return pad(planes, (0, -dim % LANES, 0, states % 2)).contiguous()


def _numbers(planes: Tensor, states: int, dim: int) -> Tensor:
    """The way back, as a tensor of its own."""
    planes = planes[..., :states, :dim].transpose(-1, -2).movedim(-3, -1)
    return torch.view_as_complex(planes.clone(memory_format=torch.contiguous_format))


def _windows(time: int) -> int:
    return (time + CHUNK - 1) // CHUNK


def _run(kernel: Any, u: Tensor, a: Tensor, w: Tensor, codes: Tensor | None, *others: Tensor) -> None:
    flags = np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)
    arrays = (kernels.array(u), a.numpy(), w.numpy(), flags, *(x.numpy() for x in others))
    kernels.run(kernel, u.shape[0] * (a.shape[-1] // LANES), *arrays)


@torch.library.custom_op("tidegate::diagonal_ssm", mutates_args=(), device_types="cpu")
def _forward_op(
    u: Tensor, decay: Tensor, weight: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states at the windows' beginnings."""
    time, dim = u.shape[1:]
    y = torch.zeros(u.shape) if codes is not None else torch.empty(u.shape)  # padding is not written to
    h = _planes(state)
    saved = torch.empty(_windows(time) * h.numel())
    _run(_forward, u, _planes(decay), _planes(weight), codes, y, h, saved)
    return y, _numbers(h, decay.shape[1], dim), saved


@torch.library.custom_op("tidegate::diagonal_ssm_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    u: Tensor, decay: Tensor, weight: Tensor, codes: Tensor | None, saved: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    du = torch.zeros(u.shape) if codes is not None else torch.empty(u.shape)
    flow = _planes(dlast)
    da, dw = torch.zeros_like(flow), torch.zeros_like(flow)
    _run(_backward, u, _planes(decay), _planes(weight), codes, saved, dy.contiguous(), du, da, dw, flow)
    states, dim = decay.shape[1], u.shape[2]
    return du, _numbers(da.sum(0), states, dim), _numbers(dw.sum(0), states, dim), _numbers(flow, states, dim)


@_forward_op.register_fake
def _(u, decay, weight, state, codes):
    dim, states = decay.shape
    row = 2 * (states + states % 2) * (-(-dim // LANES) * LANES)
    # Flat, because torch.compile would take an axis of one window for another program than an axis of two.
    saved = u.new_empty(_windows(u.shape[1]) * u.shape[0] * row)
    return u.new_empty(u.shape), state.new_empty(state.shape), saved


@_backward_op.register_fake
def _(u, decay, weight, codes, saved, dy, dlast):
    return (
        u.new_empty(u.shape),
        decay.new_empty(decay.shape),
        weight.new_empty(weight.shape),
        dlast.new_empty(dlast.shape),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # else one of zeros is made for the third output


def _backward_formula(ctx, dy, dlast, _):
    u, decay, weight, state, codes, saved = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    dlast = torch.zeros_like(state) if dlast is None else dlast
    if not torch.is_grad_enabled():
        return *_backward_op(u, decay, weight, codes, saved, dy, dlast), None
    segments = None if codes is None else Segments(codes == 1, codes != 2)

    def form(*inputs):
        return parallel.diagonal_ssm(*inputs, segments)

    return *kernels.differentiable_gradients(form, [u, decay, weight, state], (dy, dlast)), None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
