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
from tidegate.ops.kernels import (
    LANES,
    jit,
    matmul,
    matmul_columns,
    matmul_into,
    matmul_rows,
    transpose,
    wide_vectors,
)
from tidegate.ops.linear_attention import parallel
from tidegate.ops.linear_attention.chunk import (
    CHUNK,
    ZERO,
    copy,
    decays,
    keep_lower,
    load,
    multiply,
    multiply_columns,
    plan,
)
from tidegate.segments import Segments


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit
def forward_kernel(begin, end, q, k, v, g, codes, state, scale, o, last):
    wide_vectors()
    time, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    K, V = -(-keys // LANES) * LANES, -(-values // LANES) * LANES
    one = np.float32(1.0)
    begins, sizes = np.empty(time, np.int64), np.empty(time, np.int64)
    e, inverse = np.ones((CHUNK, K), np.float32), np.ones((CHUNK, K), np.float32)
    # The stored S lags behind: the true one is factor * S. It is applied where S is read and written anyway.
    first, factor = np.ones(K, np.float32), np.ones(K, np.float32)
    qs, ks = np.zeros((CHUNK, K), np.float32), np.zeros((CHUNK, K), np.float32)
    reads = np.zeros((CHUNK, K), np.float32)
    k_columns, scores = np.zeros((K, CHUNK), np.float32), np.zeros((CHUNK, CHUNK), np.float32)
    vs, out = np.zeros((CHUNK, V), np.float32), np.zeros((CHUNK, V), np.float32)
    S = np.zeros((K, V), np.float32)
    for problem in range(begin, end):
        b, h = problem // heads, problem % heads
        for j in range(keys):
            S[j, :values] = state[b, h, j]
        factor[:] = one
        chunks = plan(g, codes, b, h, begins, sizes, first)
        for chunk in range(chunks):
            t, size = begins[chunk], sizes[chunk]
            rows = -(-size // 4) * 4
            decays(g, b, h, t, size, e, inverse, first)
            load(q, b, h, t, size, qs)
            multiply(qs, e, scale, size)
            load(k, b, h, t, size, ks)
            multiply(ks, inverse, one, size)
            load(v, b, h, t, size, vs)
            if codes.shape[0] > 0 and codes[b, t] == 1:
                factor[:] = ZERO
            for j in range(K):
                factor[j] *= first[j]
            copy(qs, size, reads)
            multiply_columns(reads, factor, size)
            matmul_into(reads, K, 1, S, out, rows, keys, V)
            transpose(ks, CHUNK, K, k_columns)
            matmul_into(qs, K, 1, k_columns, scores, rows, keys, CHUNK)
            keep_lower(scores, size)
            matmul(scores, CHUNK, 1, vs, out, rows, size, V)
            matmul_rows(ks, 1, K, vs, S, K, size, V, factor)
            closing = e[size - 1]
            for j in range(K):
                factor[j] = closing[j]
            for m in range(size):
                row, source = o[b, t + m, h], out[m]
                for c in range(values):
                    row[c] = source[c]
        for j in range(keys):
            row, source, f = last[b, h, j], S[j], factor[j]
            for c in range(values):
                row[c] = source[c] * f


@jit
def backward_kernel(begin, end, q, k, v, g, codes, state, last, scale, do, dlast, dq, dk, dv, dg, dstate):
    wide_vectors()
    time, heads, keys, values = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    channels = g.shape[3]
    K, V = -(-keys // LANES) * LANES, -(-values // LANES) * LANES
    one = np.float32(1.0)
    begins, sizes = np.empty(time, np.int64), np.empty(time, np.int64)
    saved = np.empty((time, CHUNK), np.float32)  # tril(do v^T) of every chunk, from the first sweep for the second
    e, inverse = np.ones((CHUNK, K), np.float32), np.ones((CHUNK, K), np.float32)
    first, factor = np.ones(K, np.float32), np.ones(K, np.float32)
    qs, ks = np.zeros((CHUNK, K), np.float32), np.zeros((CHUNK, K), np.float32)
    q_rows, k_rows = np.zeros((CHUNK, K), np.float32), np.zeros((CHUNK, K), np.float32)
    reads, grad = np.zeros((CHUNK, K), np.float32), np.zeros((CHUNK, K), np.float32)
    vs, dos, dvs = np.zeros((CHUNK, V), np.float32), np.zeros((CHUNK, V), np.float32), np.zeros((CHUNK, V), np.float32)
    v_columns, k_columns = np.zeros((V, CHUNK), np.float32), np.zeros((K, CHUNK), np.float32)
    scores = np.zeros((CHUNK, CHUNK), np.float32)
    S_T = np.zeros((V, K), np.float32)
    R, R_T = np.zeros((K, V), np.float32), np.zeros((V, K), np.float32)
    total = np.zeros(K, np.float32)
    for problem in range(begin, end):
        b, h = problem // heads, problem % heads
        chunks = plan(g, codes, b, h, begins, sizes, first)

        # 1. Forward: the states again (transposed, so that rows run over keys), for dq.
        for j in range(keys):
            R[j, :values] = state[b, h, j]
        transpose(R, K, V, S_T)
        factor[:] = one
        for chunk in range(chunks):
            t, size = begins[chunk], sizes[chunk]
            rows = -(-size // 4) * 4
            decays(g, b, h, t, size, e, inverse, first)
            load(k, b, h, t, size, ks)
            multiply(ks, inverse, one, size)
            load(v, b, h, t, size, vs)
            load(do, b, h, t, size, dos)
            if codes.shape[0] > 0 and codes[b, t] == 1:
                factor[:] = ZERO
            for j in range(K):
                factor[j] *= first[j]
            transpose(vs, CHUNK, V, v_columns)
            matmul_into(dos, V, 1, v_columns, scores, rows, values, CHUNK)
            keep_lower(scores, size)
            for m in range(size):
                row, source = saved[t + m], scores[m]
                for n in range(CHUNK):
                    row[n] = source[n]
            matmul_into(dos, V, 1, S_T, grad, rows, values, K)
            multiply_columns(grad, factor, size)
            matmul(scores, CHUNK, 1, ks, grad, rows, size, K)
            matmul_columns(vs, 1, V, ks, S_T, V, size, K, factor)
            closing = e[size - 1]
            for j in range(K):
                factor[j] = closing[j]
            multiply(grad, e, scale, size)
            for m in range(size):
                row, source = dq[b, t + m, h], grad[m]
                for j in range(keys):
                    row[j] = source[j]

        # 2. Reverse: the gradient R of the state (both ways round), for dk, dv and the decay. R lags as S did.
        for j in range(keys):
            row, gradient, final = R[j], dlast[b, h, j], last[b, h, j]
            sum_ = ZERO
            for c in range(values):
                row[c] = gradient[c]
            for c in range(values):
                sum_ += gradient[c] * final[c]
            total[j] = sum_
        transpose(R, K, V, R_T)
        factor[:] = one
        for chunk in range(chunks - 1, -1, -1):
            t, size = begins[chunk], sizes[chunk]
            rows = -(-size // 4) * 4
            decays(g, b, h, t, size, e, inverse, first)
            load(q, b, h, t, size, q_rows)
            copy(q_rows, size, qs)
            multiply(qs, e, scale, size)
            load(k, b, h, t, size, k_rows)
            copy(k_rows, size, ks)
            multiply(ks, inverse, one, size)
            load(v, b, h, t, size, vs)
            load(do, b, h, t, size, dos)
            closing = e[size - 1]
            for j in range(K):
                factor[j] *= closing[j]
            # dv = (k e^-G) R + A^T do
            transpose(ks, CHUNK, K, k_columns)
            matmul_into(qs, K, 1, k_columns, scores, rows, keys, CHUNK)
            keep_lower(scores, size)
            copy(ks, size, reads)
            multiply_columns(reads, factor, size)
            matmul_into(reads, K, 1, R, dvs, rows, keys, V)
            matmul(scores, 1, CHUNK, dos, dvs, rows, size, V)
            # dk = e^-G (v R^T + P^T (q e^G))
            for m in range(size):
                row, source = scores[m], saved[t + m]
                for n in range(CHUNK):
                    row[n] = source[n]
            matmul_into(vs, V, 1, R_T, grad, rows, values, K)
            multiply_columns(grad, factor, size)
            matmul(scores, 1, CHUNK, qs, grad, rows, size, K)
            multiply(grad, inverse, one, size)
            # R before the chunk, but for its first token's decay
            matmul_rows(qs, 1, K, dos, R, K, size, V, factor)
            matmul_columns(dos, 1, V, qs, R_T, V, size, K, factor)
            for m in range(size):
                row, source = dv[b, t + m, h], dvs[m]
                for c in range(values):
                    row[c] = source[c]
            for m in range(size):
                row, source = dk[b, t + m, h], grad[m]
                for j in range(keys):
                    row[j] = source[j]
            starts = codes.shape[0] > 0 and codes[b, t] == 1
            load(dq, b, h, t, size, reads)
            multiply(q_rows, reads, one, size)
            multiply(k_rows, grad, one, size)
            for m in range(size - 1, -1, -1):
                from_q, from_k = q_rows[m], k_rows[m]
                for j in range(keys):
                    total[j] += from_q[j] - from_k[j]
                if channels == 1:
                    dg[b, t + m, h, 0] = total[:keys].sum()
                else:
                    row = dg[b, t + m, h]
                    for j in range(keys):
                        row[j] = total[j]
            for j in range(K):
                factor[j] = first[j]
            if starts:  # nothing came before: the first token's decay acted on zeros
                dg[b, t, h, :] = ZERO
                factor[:] = ZERO
                total[:] = ZERO
        for j in range(keys):
            row, source, f = dstate[b, h, j], R[j], factor[j]
            for c in range(values):
                row[c] = source[c] * f


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
def _(q, k, v, log_decay, state, codes, scale):  # type: ignore[no-untyped-def]
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
def _(q, k, v, log_decay, state, codes, scale, last, do, dlast):  # type: ignore[no-untyped-def]
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    decay = q.new_empty(*q.shape[:3], 1) if log_decay is None else log_decay
    return (
        *like,
        torch.empty_like(decay, memory_format=torch.contiguous_format),
        torch.empty_like(state, memory_format=torch.contiguous_format),
    )


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, codes, scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, state, codes, output[1])
    ctx.scale = scale


def _backward(ctx, do, dlast):  # type: ignore[no-untyped-def]
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
