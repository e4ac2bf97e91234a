"""Selective scan as fused CPU kernels, forward and backward.

A problem is a row of the batch and a block of channels. Time is cut into windows; of h only the value at each window's
beginning is kept for the backward kernel, which goes through the windows from the last to the first and recomputes what
is inside. The gradients of b and c are sums over channels: every block gives its part, and the parts are added in
order, so no result depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import LANES, jit
from tidegate.ops.selective_scan import parallel, sweeps
from tidegate.ops.selective_scan.sweeps import CHUNK, GROUP, LOG2E, ONE, ROW, SCRATCH, SPAN
from tidegate.segments import Segments


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit
def aligned(size):
    """Zeros that begin on a cache line, so that no vector lies across two."""
    memory = np.zeros(size + LANES, np.float32)
    begin = -(memory.ctypes.data // 4) % LANES
    return memory[begin : begin + size]


@jit
def _forward(begin, end, block, x, dt, a, b, c, d, bias, z, codes, negative, state, y, last, saved):
    time, dim, states = x.shape[1], x.shape[2], b.shape[2]
    pairs, blocks, windows = states + states % 2, -(-dim // block), -(-time // CHUNK)
    groups, size = block // LANES, pairs * LANES  # size: of the states of one group
    tokens, ends, fresh = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.uint8)
    s, bc = aligned(SCRATCH), aligned(2 * CHUNK * pairs)
    rates, h = aligned(groups * size), aligned(groups * size)
    for problem in range(begin, end):
        batch, low = problem // blocks, (problem % blocks) * block
        high = min(low + block, dim)
        sweeps.load_states(a, 0, low, high, rates, LOG2E)
        sweeps.load_states(state, batch, low, high, h, ONE)
        for window in range(windows):
            first = window * CHUNK
            if saved.shape[0] > 0:
                sweeps.store_states(saved, batch * windows + window, low, high, h)
            n, runs = sweeps.next_window(codes, batch, first, min(first + CHUNK, time), tokens, ends, fresh)
            sweeps.load_tokens(b, c, batch, tokens, n, bc)
            for left in range(low, high, SPAN * LANES):
                right = min(left + SPAN * LANES, high)
                next_first, next_left = (first, right) if right < high else (first + CHUNK, low)
                sweeps.load_channels(x, dt, d, bias, batch, left, right, tokens, n, s)
                for group in range(-(-(right - left) // LANES)):
                    at = ((left - low) // LANES + group) * size
                    for array in (x, dt, z, y):
                        sweeps.prefetch(array, batch, next_first, group, next_left, high)
                    sweeps.forwards(s, group * GROUP, bc, rates, h, at, pairs, ends, fresh, runs, negative)
                sweeps.store_outputs(z, batch, left, right, tokens, n, s, y)
        sweeps.store_states(last, batch, low, high, h)


@jit
def _backward(begin, end, block, x, dt, a, b, c, d, bias, z, codes, negative, saved, dy, dlast, gradients):
    dx, ddt, da, db, dc, dd, dbias, dz, dstate = gradients
    time, dim, states = x.shape[1], x.shape[2], b.shape[2]
    pairs, blocks, windows = states + states % 2, -(-dim // block), -(-time // CHUNK)
    groups, size = block // LANES, pairs * LANES
    tokens, ends, fresh = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.uint8)
    s, bc, sums = aligned(SCRATCH), aligned(2 * CHUNK * pairs), aligned(2 * pairs * ROW)
    rates, h = aligned(groups * size), aligned(groups * size)
    flow, rate_flow = aligned(groups * size), aligned(groups * size)
    for problem in range(begin, end):
        batch, low = problem // blocks, (problem % blocks) * block
        high = min(low + block, dim)
        part = ((problem % blocks) * x.shape[0] + batch) * time * states
        sweeps.load_states(a, 0, low, high, rates, LOG2E)
        sweeps.load_states(dlast, batch, low, high, flow, ONE)
        rate_flow[:] = np.float32(0.0)
        for window in range(windows - 1, -1, -1):
            first = window * CHUNK
            sweeps.load_states(saved, batch * windows + window, low, high, h, ONE)
            n, runs = sweeps.next_window(codes, batch, first, min(first + CHUNK, time), tokens, ends, fresh)
            sweeps.load_tokens(b, c, batch, tokens, n, bc)
            sums[:] = np.float32(0.0)
            for left in range(low, high, SPAN * LANES):
                right = min(left + SPAN * LANES, high)
                next_first, next_left = (first, right) if right < high else (first - CHUNK, low)
                sweeps.load_channels(x, dt, d, bias, batch, left, right, tokens, n, s)
                sweeps.load_gradients(dy, z, batch, left, right, tokens, n, s)
                for group in range(-(-(right - left) // LANES)):
                    at = ((left - low) // LANES + group) * size
                    for array in (x, dt, z, dy, dx, ddt, dz):
                        sweeps.prefetch(array, batch, next_first, group, next_left, high)
                    sweeps.backwards(
                        s, group * GROUP, bc, rates, h, flow, rate_flow, at, pairs, ends, fresh, runs, negative, sums
                    )
                sweeps.store_gradients(z, d, bias, dy, batch, left, right, tokens, n, s, dx, ddt, dz, dd, dbias)
            sweeps.store_sums(sums, states, tokens, n, part, db, dc)
        sweeps.store_states(dstate, batch, low, high, flow)
        sweeps.store_states(da, batch, low, high, rate_flow)


# -- operators ---------------------------------------------------------------------------------------------------------
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    state: Tensor,
    segments: Segments | None,
    negative: bool,
) -> tuple[Tensor, Tensor]:
    """a (D, N) and the states (B, D, N); the kernels have the channels last."""
    codes = None if segments is None else segments.codes()
    given = (x, dt, a.t(), b, c, d, bias, z, state.transpose(1, 2))
    # Without a backward pass to come, nothing needs to be kept for it.
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    y, last, _ = _forward_op(*given, codes, negative, keep)
    return y, last.transpose(1, 2)


@torch.library.custom_op("tidegate::selective_scan", mutates_args=(), device_types="cpu")
def _forward_op(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    negative: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = (torch.empty if codes is None else torch.zeros)(x.shape)  # no kernel visits padding
    last, saved = torch.empty(state.shape), torch.empty(_saved_size(x, a, keep))
    inputs = _arrays(x, dt, a, b, c, d, bias, z, codes, negative)
    results = (y.numpy(), last.numpy(), saved.view(-1, *a.shape).numpy())
    _run(_forward, x, *inputs, kernels.array(state), *results)
    return y.to(x.dtype), last, saved


@torch.library.custom_op("tidegate::selective_scan_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    codes: Tensor | None,
    negative: bool,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> list[Tensor]:
    """Gradients of the first eight arguments, empty for what was left out, and of the state."""
    batch, _, dim = x.shape
    new = torch.empty if codes is None else torch.zeros
    blocks = -(-dim // _block(dim))
    dx, ddt, dz = new(x.shape), new(x.shape), new(x.shape if z is not None else (0, 0, 0))
    db, dc = new(blocks, *b.shape), new(blocks, *b.shape)
    da, dd, dbias = torch.empty(batch, *a.shape), torch.zeros(batch, dim), torch.zeros(batch, dim)
    dstate = torch.empty(dlast.shape)
    tensors = (dx, ddt, da, db.flatten(), dc.flatten(), dd, dbias, dz, dstate)
    inputs = _arrays(x, dt, a, b, c, d, bias, z, codes, negative)
    upstream = (kernels.array(tensor) for tensor in (saved.view(-1, *a.shape), dy, dlast))
    _run(_backward, x, *inputs, *upstream, tuple(tensor.numpy() for tensor in tensors))
    found = (dx, ddt, da.sum(0), db.sum(0), dc.sum(0), dd.sum(0), dbias.sum(0), dz, dstate)
    inputs = (x, dt, a, b, c, d, bias, z, dlast)
    return [torch.empty(0) if t is None else gradient.to(t.dtype) for t, gradient in zip(inputs, found, strict=True)]


def _saved_size(x: Tensor, a: Tensor, keep: bool):
    """Laid flat: a compiler takes a size of 1 for a constant, and compiles again for another one."""
    return x.shape[0] * ((x.shape[1] + CHUNK - 1) // CHUNK) * a.numel() if keep else 0


def _block(dim: int) -> int:
    """Channels of a problem: a matter of `dim` alone, since it decides in which order sums over channels are taken."""
    return 128 if dim <= 1024 else 256


def _arrays(x, dt, a, b, c, d, bias, z, codes, negative):
    """What both kernels take first. What is left out becomes an array without elements, so that types never change."""
    dim = x.shape[2]
    skip = np.zeros(dim, np.float32) if d is None else kernels.array(d)
    offset = np.zeros(0, np.float32) if bias is None else kernels.array(bias)
    gate = np.zeros((0, 0, 0), np.float32) if z is None else kernels.array(z)
    flags = np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)
    first = [kernels.array(tensor) for tensor in (x, dt, a[None], b, c)]
    return *first, skip, offset, gate, flags, negative


def _run(kernel: Any, x: Tensor, *arguments: Any) -> None:
    block = _block(x.shape[2])
    kernels.run(kernel, x.shape[0] * -(-x.shape[2] // block), block, *arguments)


@_forward_op.register_fake
def _(x, dt, a, b, c, d, bias, z, state, codes, negative, keep):
    saved = x.new_empty(_saved_size(x, a, keep), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(state.shape, dtype=torch.float32), saved


@_backward_op.register_fake
def _(x, dt, a, b, c, d, bias, z, codes, negative, saved, dy, dlast):
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, a, b, c, d, bias, z, dlast)]


def _setup_context(ctx, inputs, output):
    *tensors, codes, ctx.negative, _ = inputs
    ctx.save_for_backward(*tensors, codes, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # else one of zeros is made for the third output


def _backward_formula(ctx, dy, dlast, _):
    *inputs, codes, saved = ctx.saved_tensors
    x, state = inputs[0], inputs[-1]
    dy = torch.zeros_like(x) if dy is None else dy
    dlast = torch.zeros(state.shape) if dlast is None else dlast
    if not torch.is_grad_enabled():
        found = _backward_op(*inputs[:-1], codes, ctx.negative, saved, dy, dlast)
        return *(None if x is None else g for x, g in zip(inputs, found, strict=True)), None, None, None
    segments = None if codes is None else Segments(codes == 1, codes != 2)

    def form(x, dt, a, b, c, d, bias, z, state):
        arguments = (x, dt, a.t(), b, c, d, bias, z, state.transpose(1, 2), segments, ctx.negative)
        y, last = parallel.selective_scan(*arguments)
        return y, last.transpose(1, 2)

    return *kernels.differentiable_gradients(form, inputs, (dy, dlast)), None, None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
