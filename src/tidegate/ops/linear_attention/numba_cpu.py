"""Fused CPU kernels for decayed outer products: chunks of 16 tokens, the state in cache, no state stored per token.

Chunk boundaries adapt to the data: a chunk ends before a document start, before padding, and before the decay inside it
would exceed e^-40. Relative to its first token a chunk's cumulative decay G then lies in [-40, 0], so q e^G and k e^-G
are exact in float32, whatever the gates; a chunk of one token has G = 0. Per chunk, S being the state after the first
token's decay:

    A = tril((q e^G)(k e^-G)^T)      o = A v + (q e^G) S      S <- e^G_end (S + (k e^-G)^T v)

Backward: one forward sweep (states again) gives dq, one reverse sweep (state gradients) dk and dv, and the gradient of
the log decay is the reverse cumulative sum of q dq - k dk, started at rowsum(S_T dS_T).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import LANES, copy_floats, jit, jit_views, prefetch, wide_vectors
from tidegate.ops.linear_attention import parallel
from tidegate.ops.linear_attention.chunk import (
    CHUNK,
    decays,
    keep_lower,
    load,
    multiply,
    multiply_columns,
    next_chunk,
    store,
)
from tidegate.ops.linear_attention.sweeps import gradient_of_queries, other_gradients
from tidegate.ops.matrix import clear, matmul_into, matmul_lower, matmul_rows, transpose
from tidegate.segments import Segments


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit
def forward_kernel(begin, end, q, k, v, g, codes, state, scale, o, last):
    heads, keys, values = q.shape[2], q.shape[3], v.shape[3]
    K, V = -(-keys // LANES) * LANES, -(-values // LANES) * LANES
    rows = np.zeros((4, CHUNK, K), np.float32)
    vectors = np.ones((2, K), np.float32)
    columns, scores = np.zeros((K, CHUNK), np.float32), np.zeros((CHUNK, CHUNK), np.float32)
    values_, S = np.zeros((2, CHUNK, V), np.float32), np.zeros((K, V), np.float32)
    for problem in range(begin, end):
        b, h = problem // heads, problem % heads
        forward_problem(b, h, q, k, v, g, codes, state, scale, o, last, rows, vectors, columns, scores, values_, S)


@jit_views
def forward_problem(b, h, q, k, v, g, codes, state, scale, o, last, rows, vectors, columns, scores, values_, S):
    wide_vectors()
    time, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    K, V = S.shape
    one = np.float32(1.0)
    e, inverse, qs, ks = rows[0], rows[1], rows[2], rows[3]
    vs, out = values_[0], values_[1]
    # The stored S lags behind: the true one is factor * S. It is applied where S is read and written anyway.
    first, factor = vectors[0], vectors[1]
    at = (b * heads + h) * keys * values
    for j in range(keys):
        copy_floats(state, at + j * values, S, j * V, values)
    for j in range(K):
        factor[j] = one
    t = 0
    while t < time:
        if codes.shape[0] > 0 and codes[b, t] == 2:
            t += 1
            continue
        size = next_chunk(g, codes, b, h, t, e)
        tall = -(-size // 4) * 4
        ahead, beyond = t + 2 * CHUNK, t + 3 * CHUNK
        prefetch(q, b, ahead, beyond, h)
        prefetch(k, b, ahead, beyond, h)
        prefetch(v, b, ahead, beyond, h)
        prefetch(o, b, ahead, beyond, h)
        decays(g, b, h, t, size, e, inverse, first)
        load(q, b, h, t, size, qs)
        multiply(qs, e, scale, size)
        load(k, b, h, t, size, ks)
        multiply(ks, inverse, one, size)
        load(v, b, h, t, size, vs)
        starts = codes.shape[0] > 0 and codes[b, t] == 1
        for j in range(K):
            factor[j] *= first[j]
        if starts:  # written, not multiplied: zero times an infinite state is no zero
            clear(S, 0, K)
        transpose(ks, CHUNK, K, columns)
        matmul_into(qs, K, 1, columns, scores, tall, keys, CHUNK)
        keep_lower(scores, size)
        multiply_columns(qs, factor, size)
        matmul_into(qs, K, 1, S, out, tall, keys, V)
        matmul_lower(scores, CHUNK, 1, vs, out, tall, size, V)
        matmul_rows(ks, 1, K, vs, S, K, size, V, factor)
        copy_floats(e, (size - 1) * K, factor, 0, K)
        store(out, b, h, t, size, o)
        t += size
    for j in range(keys):
        row, f = S[j], factor[j]
        for c in range(values):
            row[c] *= f
        copy_floats(S, j * V, last, at + j * values, values)


@jit
def backward_kernel(begin, end, q, k, v, g, codes, state, last, scale, do, dlast, dq, dk, dv, dg, dstate):
    time, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    K, V = -(-keys // LANES) * LANES, -(-values // LANES) * LANES
    chunks = np.empty((2, time), np.int64)
    saved = np.empty((time, CHUNK), np.float32)  # tril(do v^T) of every chunk, from the first sweep for the second
    rows = np.zeros((8, CHUNK, K), np.float32)
    vectors = np.ones((3, K), np.float32)
    columns, scores = np.zeros((2, max(K, V), CHUNK), np.float32), np.zeros((CHUNK, CHUNK), np.float32)
    values_ = np.zeros((3, CHUNK, V), np.float32)
    S_T, R = np.zeros((V, K), np.float32), np.zeros((K, V), np.float32)
    for problem in range(begin, end):
        b, h = problem // heads, problem % heads
        scratch = chunks, saved, rows, vectors, columns, scores, values_, S_T, R
        count = gradient_of_queries(b, h, k, v, g, codes, state, scale, do, dq, scratch)
        other_gradients(b, h, count, q, k, v, g, codes, last, scale, do, dlast, dq, dk, dv, dg, dstate, scratch)


# -- operators ---------------------------------------------------------------------------------------------------------
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, K), v (B, T, H, V), log_decay None or (B, T, H, 1 or K), state (B, H, K, V)."""
    dtype = q.dtype
    codes = None if segments is None else segments.codes()
    q, k, v, state = q.float(), k.float(), v.float(), state.float()
    decay = None if log_decay is None else log_decay.float()
    o, last = forward_op(q, k, v, decay, state, codes, scale)
    return o.to(dtype), last


def _arrays(q: Tensor, log_decay: Tensor | None, codes: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The decay and the segment codes as the kernels take them: a decay of one zero, and no codes, stand for None."""
    g = np.zeros((*q.shape[:3], 1), np.float32) if log_decay is None else kernels.array(log_decay)
    return g, np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)


@torch.library.custom_op("tidegate::linear_attention", mutates_args=(), device_types="cpu")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, _ = q.shape
    # Padding is visited by no chunk: its output has to be zero beforehand.
    o = torch.empty(v.shape, dtype=torch.float32) if codes is None else torch.zeros(v.shape, dtype=torch.float32)
    last = torch.empty(state.shape, dtype=torch.float32)
    g, flags = _arrays(q, log_decay, codes)
    inputs = [kernels.array(x) for x in (q, k, v)]
    kernels.run(
        forward_kernel,
        batch * heads,
        *inputs,
        g,
        flags,
        kernels.array(state),
        np.float32(scale),
        o.numpy(),
        last.numpy(),
    )
    return o, last


@forward_op.register_fake
def _(q, k, v, log_decay, state, codes, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(
        state, memory_format=torch.contiguous_format
    )


@torch.library.custom_op("tidegate::linear_attention_backward", mutates_args=(), device_types="cpu")
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    scale: float,
    last: Tensor,
    do: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    new = torch.empty if codes is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=torch.float32) for x in (q, k, v))
    dstate = torch.empty(state.shape, dtype=torch.float32)
    dg = new((batch, time, heads, 1) if log_decay is None else log_decay.shape, dtype=torch.float32)
    g, flags = _arrays(q, log_decay, codes)
    inputs = [kernels.array(x) for x in (q, k, v)]
    states, upstream = [kernels.array(x) for x in (state, last)], [kernels.array(x) for x in (do, dlast)]
    results = [x.numpy() for x in (dq, dk, dv, dg, dstate)]
    kernels.run(backward_kernel, batch * heads, *inputs, g, flags, *states, np.float32(scale), *upstream, *results)
    return dq, dk, dv, dg, dstate


@backward_op.register_fake
def _(q, k, v, log_decay, state, codes, scale, last, do, dlast):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    decay = q.new_empty(*q.shape[:3], 1) if log_decay is None else log_decay
    return (
        *like,
        torch.empty_like(decay, memory_format=torch.contiguous_format),
        torch.empty_like(state, memory_format=torch.contiguous_format),
    )


def _setup(ctx, inputs, output):
    q, k, v, log_decay, state, codes, scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, state, codes, output[1])
    ctx.scale = scale


def _backward(ctx, do, dlast):
    q, k, v, log_decay, state, codes, last = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: only the chunked PyTorch form has one
        inputs = [q, k, v, log_decay, state]
        segments = None if codes is None else Segments(codes == 1, codes != 2)
        return (
            *kernels.differentiable_gradients(
                lambda q, k, v, g, s: parallel.linear_attention(q, k, v, g, ctx.scale, s, segments), inputs, (do, dlast)
            ),
            None,
            None,
        )
    dq, dk, dv, dg, dstate = backward_op(q, k, v, log_decay, state, codes, ctx.scale, last, do, dlast)
    return dq, dk, dv, None if log_decay is None else dg, dstate, None, None


forward_op.register_autograd(_backward, setup_context=_setup)
