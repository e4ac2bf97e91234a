"""Slot scores from the kernels of linear attention, whose backward pass they are (see parallel.py).

With w = do in place of its queries, keys = slots and values = k, linear attention's output is dq here, and its backward
pass for the upstream gradient q gives the gradients of slots, k, the decay and the state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import LANES, jit
from tidegate.ops.linear_attention import numba_cpu as outer_products
from tidegate.ops.linear_attention.chunk import CHUNK
from tidegate.ops.linear_attention.sweeps import gradient_of_queries
from tidegate.ops.slot_scores import parallel
from tidegate.segments import Segments


@jit
def _forward(begin, end, slots, k, g, codes, state, scale, q, o, last):
    time, heads, rows, width = slots.shape[1], slots.shape[2], slots.shape[3], k.shape[3]
    M, K = -(-rows // LANES) * LANES, -(-width // LANES) * LANES
    chunks, saved = np.empty((2, time), np.int64), np.empty((time, CHUNK), np.float32)
    rows_ = np.zeros((8, CHUNK, M), np.float32)
    vectors = np.ones((3, M), np.float32)
    columns, scores = np.zeros((2, max(M, K), CHUNK), np.float32), np.zeros((CHUNK, CHUNK), np.float32)
    values = np.zeros((3, CHUNK, K), np.float32)
    S_T, R = np.zeros((K, M), np.float32), np.zeros((M, K), np.float32)
    for problem in range(begin, end):
        b, h = problem // heads, problem % heads
        scratch = chunks, saved, rows_, vectors, columns, scores, values, S_T, R
        gradient_of_queries(b, h, slots, k, g, codes, state, scale, q, o, scratch)
        for m in range(rows):  # the sweep's state lags behind by one factor per row
            for c in range(width):
                last[b, h, m, c] = S_T[c, m] * vectors[1, m]


def slot_scores(
    q: Tensor, k: Tensor, slots: Tensor, log_decay: Tensor, scale: float, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, K), slots and log_decay (B, T, H, M), state (B, H, M, K), all float32."""
    o, last = _forward_op(q, k, slots, log_decay, state, None if segments is None else segments.codes(), scale)
    return o, last


@torch.library.custom_op("tidegate::slot_scores", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor, k: Tensor, slots: Tensor, log_decay: Tensor, state: Tensor, codes: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    # Padding is visited by no chunk: its output has to be zero beforehand.
    o, last = (torch.empty if codes is None else torch.zeros)(slots.shape), torch.empty(state.shape)
    flags = np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)
    inputs = [kernels.array(x) for x in (slots, k, log_decay)]
    after = (flags, kernels.array(state), np.float32(scale), kernels.array(q), o.numpy(), last.numpy())
    kernels.run(_forward, q.shape[0] * q.shape[2], *inputs, *after)
    return o, last


@_forward_op.register_fake
def _(q, k, slots, log_decay, state, codes, scale):
    return slots.new_empty(slots.shape), state.new_empty(state.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward_formula(ctx, do, dlast):
    q, k, slots, log_decay, state, codes, last = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: only the PyTorch form has one
        segments = None if codes is None else Segments(codes == 1, codes != 2)
        gradients = kernels.differentiable_gradients(
            lambda q, k, slots, g, s: parallel.slot_scores(q, k, slots, g, ctx.scale, s, segments),
            [q, k, slots, log_decay, state],
            (do, dlast),
        )
        return *gradients, None, None
    memory = (slots, k, log_decay, state, codes, ctx.scale)
    dq, _ = outer_products.forward_op(do, *memory)
    _, dslots, dk, dg, dstate = outer_products.backward_op(do, *memory, last, q, dlast)
    return dq, dk, dslots, dg, dstate, None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
