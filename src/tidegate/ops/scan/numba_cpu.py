"""The diagonal linear recurrence as fused CPU kernels, forward and backward.

A problem is a row of the batch and a block of channels. Each step reads h of the step before from the row of the output
that was just written, which is still in the first-level cache. Complex numbers are pairs of float32. A decay that does
not depend on time is one row of `a`, read again at every step (`varying` is 0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tidegate.ops import kernels
from tidegate.ops.scan import parallel
from tidegate.segments import Segments


def scan(a: Tensor, b: Tensor, state: Tensor, segments: Segments | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """a (D,) or (B, T, D); segments in the order in which time runs."""
    codes = None if segments is None else segments.codes()
    if b.is_complex() or a.is_complex() or state.is_complex():
        a, b, state = a.to(torch.complex64), b.to(torch.complex64), state.to(torch.complex64)
    return _call(a, b, state, codes, reverse)


# -- kernels -----------------------------------------------------------------------------------------------------------
@kernels.jit
def _forward(begin, end, block, b, a, state, codes, pairs, varying, reverse, h, last):
    time, width = b.shape[1], b.shape[2]
    blocks = (width + block - 1) // block
    masked = codes.shape[0] > 0
    zeros = np.zeros(block, np.float32)
    for problem in range(begin, end):
        n, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, width)
        before = state[n, lo:hi]
        for s in range(time):
            t = time - 1 - s if reverse else s
            ht = h[n, t, lo:hi]
            code = codes[n, s] if masked else 0
            if code == 2:
                ht[:] = np.float32(0.0)
                continue
            if code == 1:
                before = zeros[: hi - lo]
            at, bt = a[n * varying, t * varying, lo:hi], b[n, t, lo:hi]
            if pairs:
                for j in range(0, ht.shape[0], 2):
                    ht[j] = at[j] * before[j] - at[j + 1] * before[j + 1] + bt[j]
                    ht[j + 1] = at[j] * before[j + 1] + at[j + 1] * before[j] + bt[j + 1]
            else:
                for j in range(ht.shape[0]):
                    ht[j] = at[j] * before[j] + bt[j]
            before = ht
        last[n, lo:hi] = before


@kernels.jit
def _backward(begin, end, block, dh, a, h, state, codes, dlast, pairs, varying, reverse, da, db, dstate):
    # g_t = dh_t + conj(a_{t+1}) g_{t+1}, the gradient of all that h_t went into; db_t = g_t, da_t = g_t conj(h_{t-1}).
    time, width = h.shape[1], h.shape[2]
    blocks = (width + block - 1) // block
    masked = codes.shape[0] > 0
    zeros = np.zeros(block, np.float32)
    for problem in range(begin, end):
        n, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, width)
        flow = dstate[n, lo:hi]  # conj(a_{t+1}) g_{t+1}, at first what comes through the final state
        flow[:] = dlast[n, lo:hi]
        if varying == 0:
            da[n, 0, lo:hi] = np.float32(0.0)
        for s in range(time - 1, -1, -1):
            t = time - 1 - s if reverse else s
            gt = db[n, t, lo:hi]
            code = codes[n, s] if masked else 0
            if code == 2:
                gt[:] = np.float32(0.0)
                if varying:
                    da[n, t, lo:hi] = np.float32(0.0)
                continue
            # The token before: the nearest real one, or the state, or nothing.
            earlier = s - 1
            while masked and earlier >= 0 and codes[n, earlier] == 2:
                earlier -= 1
            if code == 1:
                before = zeros[: hi - lo]
            elif earlier < 0:
                before = state[n, lo:hi]
            else:
                before = h[n, time - 1 - earlier if reverse else earlier, lo:hi]
            at, dht, dat = a[n * varying, t * varying, lo:hi], dh[n, t, lo:hi], da[n, t * varying, lo:hi]
            for j in range(gt.shape[0]):
                gt[j] = dht[j] + flow[j]
            if pairs:
                for j in range(0, gt.shape[0], 2):
                    flow[j] = at[j] * gt[j] + at[j + 1] * gt[j + 1]
                    flow[j + 1] = at[j] * gt[j + 1] - at[j + 1] * gt[j]
                if varying:
                    for j in range(0, gt.shape[0], 2):
                        dat[j] = gt[j] * before[j] + gt[j + 1] * before[j + 1]
                        dat[j + 1] = gt[j + 1] * before[j] - gt[j] * before[j + 1]
                else:
                    for j in range(0, gt.shape[0], 2):
                        dat[j] += gt[j] * before[j] + gt[j + 1] * before[j + 1]
                        dat[j + 1] += gt[j + 1] * before[j] - gt[j] * before[j + 1]
            else:
                for j in range(gt.shape[0]):
                    flow[j] = at[j] * gt[j]
                if varying:
                    for j in range(gt.shape[0]):
                        dat[j] = gt[j] * before[j]
                else:
                    for j in range(gt.shape[0]):
                        dat[j] += gt[j] * before[j]
            if code == 1:
                flow[:] = np.float32(0.0)


# -- operators ---------------------------------------------------------------------------------------------------------
def _floats(tensor: Tensor) -> np.ndarray:
    """Complex numbers as neighbouring columns; a constant decay as (1, 1, D)."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach().resolve_conj().resolve_neg().contiguous()).flatten(-2)
    return kernels.array(tensor if tensor.ndim > 1 else tensor[None, None])


def _codes(codes: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)


def _run(kernel: Any, first: Tensor, *arguments: Any) -> None:
    array = _floats(first)
    block = kernels.block(array.shape[2], array.shape[0])
    kernels.run(kernel, array.shape[0] * -(-array.shape[2] // block), block, array, *arguments)


@torch.library.custom_op("tidegate::scan", mutates_args=(), device_types="cpu")
def _forward_op(a: Tensor, b: Tensor, state: Tensor, codes: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    h, last = _fake_forward(a, b, state, codes, reverse)
    flags = (b.is_complex(), int(a.ndim > 1), reverse)
    _run(_forward, b, _floats(a), _floats(state), _codes(codes), *flags, _floats(h), _floats(last))
    return h, last


@torch.library.custom_op("tidegate::scan_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    a: Tensor, h: Tensor, state: Tensor, codes: Tensor | None, reverse: bool, dh: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    varying = a.ndim > 1
    da = h.new_empty(h.shape if varying else (h.shape[0], 1, h.shape[2]))
    db, dstate = torch.empty_like(dh, memory_format=torch.contiguous_format), torch.empty(state.shape, dtype=h.dtype)
    flags = (h.is_complex(), int(varying), reverse)
    inputs = (_floats(a), _floats(h), _floats(state), _codes(codes), _floats(dlast))
    _run(_backward, dh, *inputs, *flags, _floats(da), _floats(db), _floats(dstate))
    return da if varying else da.sum((0, 1)), db, dstate


@_forward_op.register_fake
def _fake_forward(a, b, state, codes, reverse):
    return b.new_empty(b.shape), b.new_empty(state.shape)


@_backward_op.register_fake
def _(a, h, state, codes, reverse, dh, dlast):
    return a.new_empty(a.shape), h.new_empty(h.shape), h.new_empty(state.shape)


def _setup_context(ctx, inputs, output):
    a, _, state, codes, ctx.reverse = inputs
    ctx.save_for_backward(a, output[0], state, codes)


def _backward_formula(ctx, dh, dlast):
    a, h, state, codes = ctx.saved_tensors
    # With create_graph=True the gradients are wanted as functions of a, h, state and theirs.
    formula = _differentiable_backward if torch.is_grad_enabled() else _call_backward
    da, db, dstate = formula(a, h, state, codes, ctx.reverse, dh, dlast)
    return da, db, dstate, None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
_call, _call_backward = kernels.direct(_forward_op, _setup_context, _backward_formula), kernels.direct(_backward_op)


def _differentiable_backward(a, h, state, codes, reverse, dh, dlast):
    """What the kernel `_backward` computes, out of differentiable parts. h is the result of the forward scan."""
    constant = a.ndim == 1
    a = a.expand(h.shape)
    if reverse:
        a, h, dh = a.flip(1), h.flip(1), dh.flip(1)
    if codes is None:
        codes = torch.zeros(h.shape[:2], dtype=torch.uint8)
    segments = Segments(codes == 1, codes != 2)
    start, valid = segments.starts[..., None], segments.valid[..., None]
    decay = torch.where(valid, torch.where(start, 0, a), 1).conj()
    following = pad(decay[:, 1:], (0, 0, 0, 1), value=1.0)
    flow, _ = parallel.scan(following.flip(1), torch.where(valid, dh, 0).flip(1), dlast, None)
    flow = flow.flip(1)
    index = segments.previous()[..., None]
    before = h.gather(1, index.clamp(min=0).expand(h.shape))
    before = torch.where(index >= 0, before, torch.where(start, 0, state[:, None]))
    da, db = torch.where(valid, flow * before.conj(), 0), torch.where(valid, flow, 0)
    if reverse:
        da, db = da.flip(1), db.flip(1)
    return da.sum((0, 1)) if constant else da, db, decay[:, 0] * flow[:, 0]
