"""Fused CPU kernels for decayed outer products: chunks of 16 tokens, the state in cache, no state stored per token.

Chunk boundaries adapt to the data (chunks.py): the cumulative decay G inside a chunk lies in [-40, 0], so q e^G and
k e^-G are exact in float32, whatever the gates. Per chunk, S being the state before it:

    A = tril((q e^G)(k e^-G)^T)      o = A v + (q e^G) S      S <- e^G_end (S + (k e^-G)^T v)

Backward: one forward sweep (states again) gives dq, one reverse sweep (state gradients) dk and dv, and the gradient of
the log decay is the reverse cumulative sum of q dq - k dk, started at rowsum(S_T dS_T).

A problem is one (batch, head) pair. Where pairs do not fill the threads evenly, columns of values are split as well;
backward, columns of keys for dq, dk and the decay, and of values for dv. Scores are then computed once per thread.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.chunks import CHUNK, clear, exp_and_inverse, exp_of, multiply, next_chunk
from tidegate.ops.kernels import LANES, jit_views
from tidegate.ops.linear_attention import parallel
from tidegate.ops.linear_attention.chunk import read_earlier, rows, rows_of_logs, scores, write_rows
from tidegate.ops.linear_attention.sweeps import gradient_of_queries, other_gradients, places
from tidegate.ops.passes import prefetch
from tidegate.ops.tiles import transpose
from tidegate.segments import Segments


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit_views
def forward_kernel(begin, end, x, dims, q, k, v, g, codes, state, scale, o, last):
    T, H, K, V, G = dims
    parts = -(-V // LANES)
    Kp, Vp = -(-K // LANES) * LANES, parts * LANES
    logs, row = 0, Kp if G > 1 else 1
    qs, ks, turned = CHUNK * Kp + Kp, 2 * CHUNK * Kp + Kp, 3 * CHUNK * Kp + Kp
    pairs = turned + Kp * CHUNK
    factor = pairs + CHUNK * CHUNK
    S = factor + Kp
    one = np.float32(1.0)
    while begin < end:
        problem = begin // parts
        first = (begin - problem * parts) * LANES
        columns = min((end - problem * parts) * LANES, V) - first
        begin = min(end, (problem + 1) * parts)
        b, h, at = problem // H, problem % H, problem * K * V + first
        multiply(K, columns, ((x, S, Vp),), ((state, at, V), one))
        t = 0
        while t < T:
            code = codes[b * T + t] if codes.size > 0 else 0
            if code == 2:
                t += 1
                continue
            token = (b * T + t) * H + h
            ahead = token + 2 * CHUNK * H
            prefetch(CHUNK, K, (q, ahead * K, H * K))
            prefetch(CHUNK, K, (k, ahead * K, H * K))
            prefetch(CHUNK, columns, (v, ahead * V + first, H * V))
            prefetch(CHUNK, columns, (o, ahead * V + first, H * V))
            prefetch(CHUNK, G, (g, ahead * G, H * G))
            size, strong = next_chunk(x, logs, row, g, codes, b * T + t, token * G, H * G, G, T - t)
            if code == 1:  # written, not multiplied: zero times an infinite state is no zero
                clear(K, columns, ((x, S, Vp),), ())
            elif strong:
                exp_of(x, factor, K, g, token * G, G)
                multiply(K, columns, ((x, S, Vp),), ((x, S, Vp), (x, factor)))
            exp_of(x, factor, K, x, logs + (size - 1) * row, G)
            outputs, inputs = ((x, qs, Kp), (x, ks, Kp)), ((q, token * K, H * K), (k, token * K, H * K), scale)
            if G > 1:
                rows_of_logs(size, K, outputs, ((x, logs, Kp), *inputs))
            else:
                exp_and_inverse(1, size, ((x, logs, 0), (x, logs + CHUNK, 0)), ((x, logs, 0),))
                rows(size, K, outputs, ((x, logs), (x, logs + CHUNK), *inputs))
            transpose(size, K, (x, turned, CHUNK), (x, ks, Kp))
            scores(size, CHUNK, (x, pairs, CHUNK), (x, qs, Kp, 1), (x, turned, CHUNK), K, (), (x, 0, 0))
            value = (v, token * V + first, H * V)
            read_earlier(
                *(size, columns, (o, token * V + first, H * V), (x, qs, Kp, 1), (x, S, Vp), K),
                *(((x, pairs, CHUNK, 1), value, size), (x, 0, 0)),
            )
            write_rows(K, columns, (x, S, Vp), (x, ks, 1, Kp), value, size, (), (x, factor, 0))
            t += size
        multiply(K, columns, ((last, at, V),), ((x, S, Vp), one))


@jit_views
def backward_kernel(begin, end, x, dims, q, k, v, g, codes, state, last, scale, do, dlast, dq, dk, dv, dg, dstate):
    T, H, K, V, _ = dims
    by_key, by_value = 2 * -(-K // LANES), -(-V // LANES)  # keys take two sweeps, values one
    parts = by_key + by_value
    size = places(T, K, V)[-1]
    chunks = x[size : size + 2 * T].view(np.int32).reshape(2, T)
    while begin < end:
        problem = begin // parts
        first, until = begin - problem * parts, min(end - problem * parts, parts)
        begin = problem * parts + until
        b, h = problem // H, problem % H
        first_key, until_key = (min(first, by_key) + 1) // 2 * LANES, min((min(until, by_key) + 1) // 2 * LANES, K)
        first_value, until_value = max(first - by_key, 0) * LANES, min(max(until - by_key, 0) * LANES, V)
        first_key = min(first_key, until_key)
        count = gradient_of_queries(x, chunks, dims, b, h, first_key, until_key, k, v, g, codes, state, scale, do, dq)
        other_gradients(
            x, chunks, dims, b, h, count, first_key, until_key, first_value, until_value,
            q, k, v, g, codes, last, scale, do, dlast, dq, dk, dv, dg, dstate,
        )  # fmt: skip


# -- operators ---------------------------------------------------------------------------------------------------------
def _run(kernel, parts: int, scratch: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, codes, *arguments):
    """Launch a kernel: the letters' sizes, everything flat; a decay of one zero, and no codes, stand for None."""
    (batch, time, heads, keys), values = q.shape, v.shape[-1]
    decay = np.zeros(batch * time * heads, np.float32) if g is None else kernels.flat(g)
    flags = np.zeros(0, np.uint8) if codes is None else kernels.flat(codes)
    dims = (time, heads, keys, values, 1 if g is None else g.shape[-1])
    inputs = kernels.flat(q), kernels.flat(k), kernels.flat(v)
    kernels.run(kernel, batch * heads, dims, *inputs, decay, flags, *arguments, parts=parts, scratch=scratch)


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
    # Padding is visited by no chunk: its output has to be zero beforehand.
    o = torch.empty(v.shape, dtype=torch.float32) if codes is None else torch.zeros(v.shape, dtype=torch.float32)
    last = torch.empty(state.shape, dtype=torch.float32)
    K, V = kernels.pad(q.shape[-1]), kernels.pad(v.shape[-1])
    scratch = 4 * CHUNK * K + CHUNK**2 + 2 * K + K * V
    parts = V // LANES
    arguments = kernels.flat(state), np.float32(scale), o.view(-1).numpy(), last.view(-1).numpy()
    _run(forward_kernel, parts, scratch, q, k, v, log_decay, codes, *arguments)
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
    new = torch.empty if codes is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=torch.float32) for x in (q, k, v))
    dstate = torch.empty(state.shape, dtype=torch.float32)
    time, K, V = q.shape[1], kernels.pad(q.shape[-1]), kernels.pad(v.shape[-1])
    # Where keys share a decay, every vector of keys has a sum of its own, whichever thread has which.
    shared = log_decay is None or log_decay.shape[-1] == 1
    dg = new((*q.shape[:3], K // LANES) if shared else q.shape, dtype=torch.float32)
    parts, scratch = (2 * K + V) // LANES, places.py_func(time, K, V)[-1] + 2 * time
    given = kernels.flat(state), kernels.flat(last), np.float32(scale), kernels.flat(do), kernels.flat(dlast)
    results = (x.view(-1).numpy() for x in (dq, dk, dv, dg, dstate))
    _run(backward_kernel, parts, scratch, q, k, v, log_decay, codes, *given, *results)
    if shared:
        dg = dg.sum(-1, keepdim=True)
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
