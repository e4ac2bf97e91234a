"""Slot scores from the kernels of linear attention, whose backward pass they are (see parallel.py).

With w = do in place of its queries, keys = slots and values = k, linear attention's output is dq here, and its backward
pass for the upstream gradient q gives the gradients of slots, k, the decay and the state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import LANES, jit_views
from tidegate.ops.linear_attention import numba_cpu as outer_products
from tidegate.ops.linear_attention.sweeps import gradient_of_queries, places
from tidegate.ops.slot_scores import parallel
from tidegate.segments import Segments


@jit_views
def _forward(begin, end, x, dims, unused, slots, k, g, codes, state, scale, q, o, last):
    """The letters are linear attention's: K numbers the slots, V the keys' channels. Slots are split among threads."""
    T, H, K, V, _ = dims
    parts, Kp = -(-K // LANES), -(-K // LANES) * LANES
    _, _, _, _, S, _, _, size = places(T, K, V)
    chunks = x[size : size + 2 * T].view(np.int32).reshape(2, T)
    while begin < end:
        problem = begin // parts
        first, until = (begin - problem * parts) * LANES, min((end - problem * parts) * LANES, K)
        begin = min(end, (problem + 1) * parts)
        b, h, at = problem // H, problem % H, problem * K * V
        gradient_of_queries(x, chunks, dims, b, h, first, until, slots, k, g, codes, state, scale, q, o)
        for slot in range(first, until):  # the sweep keeps its state turned
            for c in range(V):
                last[at + slot * V + c] = x[S + c * Kp + slot]


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
    (_, time, _, rows), width = slots.shape, k.shape[-1]
    parts, scratch = kernels.pad(rows) // LANES, places.py_func(time, rows, width)[-1] + 2 * time
    arguments = kernels.flat(state), np.float32(scale), kernels.flat(q), o.view(-1).numpy(), last.view(-1).numpy()
    outer_products._run(_forward, parts, scratch, slots, slots, k, log_decay, codes, *arguments)
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
