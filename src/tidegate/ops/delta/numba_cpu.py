"""CPU kernels of the diagonal-plus-rank-one recurrence: chunks of up to 16 tokens, the state stays in cache.

One (batch, head) pair is one problem. The backward pass keeps the chunks' writes and every fourth state, and walks the
chunks in reverse with the adjoint of each chunk's equations (chunk.py has both).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.delta import parallel
from tidegate.ops.delta.chunk import (
    INVERSE,
    KE,
    KM,
    ONE,
    QAP,
    QAX,
    STACKS,
    WHOLE,
    C,
    P,
    gather,
    load_rows,
    load_values,
    mask,
    next_chunk,
    pull_back,
    row_products,
    scatter,
    solve_writes,
    store_decay_gradient,
    store_gradients,
)
from tidegate.ops.kernels import jit, jit_views
from tidegate.ops.matrix import clear, copy, matmul, matmul_into, matmul_rows, transpose
from tidegate.segments import Segments

BLOCK = 4  # chunks between two kept states


# -- kernels -----------------------------------------------------------------------------------------------------------
# The outer functions allocate scratch, the inner ones solve one problem and allocate nothing (see kernels.jit_views).
@jit
def _zeros(count, rows, columns):
    return np.zeros((count, rows, columns), np.float32)


@jit
def _stacks(count, columns):
    """Stacks of `count` chunks. Decays are one, and stay so where there is no decay and in the columns that pad K."""
    stacks = np.zeros((count, STACKS, 2 * C, columns), np.float32)
    for chunk in range(count):
        for stack in (P, INVERSE):
            for m in range(2 * C):
                for c in range(columns):
                    stacks[chunk, stack, m, c] = ONE
    return stacks


@jit
def _forward(begin, end, q, k, v, a, b, beta, g, codes, state, scale, padded, o, final):
    Kp, Vp = padded
    tokens, total = np.zeros(C, np.int64), np.zeros(max(g.shape[3], 1), np.float32)
    W, KT, M, S = _stacks(1, Kp)[0], _zeros(1, Kp, 2 * C)[0], _zeros(1, 2 * C, 2 * C)[0], _zeros(1, Kp, Vp)[0]
    Z, XO = _zeros(1, 2 * C, Vp)[0], _zeros(1, 2 * C, Vp)[0]
    for problem in range(begin, end):
        _forward_problem(
            problem, q, k, v, a, b, beta, g, codes, state, scale, o, final, tokens, total, W, KT, M, S, Z, XO
        )


@jit_views
def _forward_problem(problem, q, k, v, a, b, beta, g, codes, state, scale, o, final, tokens, total, W, KT, M, S, Z, XO):
    T, H, K, V, Kp, Vp = q.shape[1], q.shape[2], q.shape[3], v.shape[3], S.shape[0], S.shape[1]
    delta, L = a.shape[0] == 0, C if b.shape[0] == 0 else 2 * C
    far, near, X = W[QAX], W[QAP], XO[C:]
    batch, head = problem // H, problem % H
    copy(state[batch, head], S, K, V)
    t = 0
    while True:
        n, t = next_chunk(codes, g, T, t, batch, head, tokens, total)
        if n == 0:
            break
        if codes.shape[0] > 0 and codes[batch, tokens[0]] == 1:
            clear(S, 0, K)
        rows = -(-n // 4) * 4
        load_rows(q, k, a, b, beta, g, scale, tokens, n, batch, head, True, W, KT)
        load_values(v, beta, tokens, n, batch, head, delta, Z)
        matmul_into(far, Kp, 1, S, XO, rows, K, Vp)
        matmul_into(far[C:], Kp, 1, S, X, rows, K, Vp)
        matmul_into(near, Kp, 1, KT, M, rows, K, L)
        matmul_into(near[C:], Kp, 1, KT, M[C:], rows, K, L)
        mask(M, n, L)
        solve_writes(M, X, Z, n, L)
        matmul(M, 2 * C, 1, Z, XO, rows, L, Vp)
        scatter(XO, tokens, n, batch, head, o)
        matmul_rows(W[KE], 1, Kp, Z, S, Kp, n if L == C else L, Vp, W[P, WHOLE])
    copy(S, final[batch, head], K, V)


@jit_views
def _count(problem, codes, g, T, H, tokens, total, begins):
    """Where each chunk of a problem begins; how many there are."""
    chunks, t = 0, 0
    while True:
        n, t = next_chunk(codes, g, T, t, problem // H, problem % H, tokens, total)
        if n == 0:
            return chunks
        chunks += 1
        begins[chunks] = t


@jit
def _backward(
    begin, end, q, k, v, a, b, beta, g, codes, state, scale, padded, do, dfinal, dq, dk, dv, da, db, dbeta, dg, dstate
):
    T, H, Kp, Vp = q.shape[1], q.shape[2], padded[0], padded[1]
    total, begins = np.zeros(max(g.shape[3], 1), np.float32), np.zeros(T + 1, np.int64)
    tokens, sizes = np.zeros((BLOCK, C), np.int64), np.zeros(BLOCK, np.int64)
    # What a block of chunks needs twice stands in slots, one per chunk; what is needed once comes after them.
    stacks, keys, values = _stacks(BLOCK + 1, Kp), _zeros(BLOCK + 2, Kp, 2 * C), _zeros(BLOCK + 3, 2 * C, Vp)
    turned, pairs, states = _zeros(2, Vp, 2 * C), _zeros(2, 2 * C, 2 * C), _zeros(BLOCK + 2, Kp, Vp)
    shared = np.zeros(q.shape[3], np.float32)
    kept, writes = _zeros(0, Kp, Vp), _zeros(0, C, Vp)
    for problem in range(begin, end):
        chunks = _count(problem, codes, g, T, H, tokens[0], total, begins)
        if writes.shape[0] < chunks:
            kept, writes = _zeros(-(-chunks // BLOCK), Kp, Vp), _zeros(chunks, C, Vp)
        scratch = (tokens, sizes, total, stacks, keys, values, turned, pairs, states, shared)
        _replay(problem, chunks, begins, q, k, v, a, b, beta, g, codes, state, scale, kept, writes, scratch)
        _reverse(
            *(problem, chunks, begins, q, k, v, a, b, beta, g, codes, scale, kept, writes, scratch),
            *(do, dfinal, dq, dk, dv, da, db, dbeta, dg, dstate),
        )


@jit_views
def _replay(problem, chunks, begins, q, k, v, a, b, beta, g, codes, state, scale, kept, writes, scratch):
    """Forward again, keeping the chunks' writes and every BLOCK-th state."""
    tokens, _, total, stacks, keys, values, _, pairs, states, _ = scratch
    T, H, K, V, Kp, Vp = q.shape[1], q.shape[2], q.shape[3], v.shape[3], states.shape[1], states.shape[2]
    delta, L = a.shape[0] == 0, C if b.shape[0] == 0 else 2 * C
    at, W, KT, Z, X, M, S = tokens[0], stacks[0], keys[0], values[0], values[1], pairs[0], states[0]
    batch, head = problem // H, problem % H
    copy(state[batch, head], S, K, V)
    for chunk in range(chunks):
        n, _ = next_chunk(codes, g, T, begins[chunk], batch, head, at, total)
        if codes.shape[0] > 0 and codes[batch, at[0]] == 1:
            clear(S, 0, K)
        if chunk % BLOCK == 0:
            copy(S, kept[chunk // BLOCK], Kp, Vp)
        rows = -(-n // 4) * 4
        load_rows(q, k, a, b, beta, g, scale, at, n, batch, head, False, W, KT)
        load_values(v, beta, at, n, batch, head, delta, Z)
        matmul_into(W[QAX, C:], Kp, 1, S, X, rows, K, Vp)
        matmul_into(W[QAP, C:], Kp, 1, KT, M[C:], rows, K, L)
        mask(M, n, L)
        solve_writes(M, X, Z, n, L)
        copy(Z[L - C :], writes[chunk], C, Vp)
        matmul_rows(W[KE], 1, Kp, Z, S, Kp, L, Vp, W[P, WHOLE])


@jit_views
def _reverse(
    problem,
    chunks,
    begins,
    q,
    k,
    v,
    a,
    b,
    beta,
    g,
    codes,
    scale,
    kept,
    writes,
    scratch,
    do,
    dfinal,
    dq,
    dk,
    dv,
    da,
    db,
    dbeta,
    dg,
    dstate,
):
    """Gradients, from the last chunk to the first; the states of a block are made again from the kept one."""
    tokens, sizes, total, stacks, keys, values, turned, pairs, states, shared = scratch
    T, H, K, V, Kp, Vp = q.shape[1], q.shape[2], q.shape[3], v.shape[3], states.shape[1], states.shape[2]
    delta, L = a.shape[0] == 0, C if b.shape[0] == 0 else 2 * C
    dW, M, dM, dS, DOR, dZ = stacks[BLOCK], pairs[0], pairs[1], states[BLOCK + 1], values[BLOCK + 1], values[BLOCK + 2]
    DOT, ZT, dQAT, dKT = turned[0], turned[1], keys[BLOCK], keys[BLOCK + 1]
    batch, head = problem // H, problem % H
    copy(dfinal[batch, head], dS, K, V)
    for block in range(-(-chunks // BLOCK) - 1, -1, -1):
        offset = block * BLOCK
        slots = min(BLOCK, chunks - offset)
        for slot in range(slots):
            n, _ = next_chunk(codes, g, T, begins[offset + slot], batch, head, tokens[slot], total)
            sizes[slot], at, W, S0, before = n, tokens[slot], stacks[slot], states[slot], max(slot - 1, 0)
            if codes.shape[0] > 0 and codes[batch, at[0]] == 1:
                clear(S0, 0, K)
            elif slot == 0:
                copy(kept[block], S0, Kp, Vp)
            else:
                copy(states[before], S0, Kp, Vp)
                matmul_rows(stacks[before, KE], 1, Kp, values[before], S0, Kp, L, Vp, stacks[before, P, WHOLE])
            load_rows(q, k, a, b, beta, g, scale, at, n, batch, head, True, W, keys[slot])
            if L > C:
                load_values(v, beta, at, n, batch, head, delta, values[slot])
            copy(writes[offset + slot], values[slot][L - C :], C, Vp)

        for slot in range(slots - 1, -1, -1):
            n, at, W, S0, Z = sizes[slot], tokens[slot], stacks[slot], states[slot], values[slot]
            gather(do, at, n, batch, head, DOR)
            clear(DOR, n, C)
            matmul_into(W[QAP], Kp, 1, keys[slot], M, 2 * C, K, L)
            mask(M, n, L)
            pull_back(M, W[KE], dS, DOR, dZ, n, L)
            transpose(DOR, 2 * C, Vp, DOT)
            transpose(Z, L, Vp, ZT)
            matmul_into(DOR, Vp, 1, ZT, dM, 2 * C, V, L)
            mask(dM, n, L)
            matmul_into(S0, Vp, 1, DOT, dQAT, Kp, V, 2 * C)
            matmul_into(dS, Vp, 1, ZT, dKT, Kp, V, L)
            transpose(dQAT, Kp, 2 * C, dW[QAX])
            transpose(dKT, Kp, L, dW[KE])
            matmul_into(dM, 2 * C, 1, W[KM], dW[QAP], 2 * C, L, Kp)
            matmul_into(dM, 1, 2 * C, W[QAP], dW[KM], L, 2 * C, Kp)
            if g.shape[3] > 0:
                row_products(S0, dS, W[P, WHOLE], shared, K, Vp)
                store_decay_gradient(shared, W, dW, at, n, batch, head, delta, L, dg)
            store_gradients(k, v, beta, scale, at, n, batch, head, W, dW, dZ, dq, dk, dv, da, db, dbeta)
            if codes.shape[0] > 0 and codes[batch, at[0]] == 1:
                clear(dS, 0, K)
            else:
                matmul_rows(W[QAX], 1, Kp, DOR, dS, Kp, 2 * C, Vp, W[P, WHOLE])
    copy(dS, dstate[batch, head], K, V)


# -- torch operators ---------------------------------------------------------------------------------------------------
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """See `tidegate.ops.dplr`; without `a` the delta rule with step `beta`. log_decay None or (B, T, H, 1 or K)."""
    codes = None if segments is None else segments.codes()
    tensors = [None if x is None else x.to(torch.float32) for x in (q, k, v, a, b, beta, log_decay, state)]
    o, final = forward_op(*tensors, codes, scale)
    return o.to(q.dtype), final.to(state.dtype)


@torch.library.custom_op("tidegate::dplr", mutates_args=(), device_types="cpu")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    new = torch.empty if codes is None else torch.zeros  # no chunk visits padding
    o, final = new(v.shape, dtype=torch.float32), torch.empty(state.shape, dtype=torch.float32)
    arguments = _arguments(q, k, v, a, b, beta, log_decay, codes, state, scale)
    _run(_forward, q, v, *arguments, o.numpy(), final.numpy())
    return o, final


@forward_op.register_fake
def _(q, k, v, a, b, beta, log_decay, state, codes, scale):
    return torch.empty(v.shape, dtype=v.dtype), torch.empty(state.shape, dtype=state.dtype)


@torch.library.custom_op("tidegate::dplr_backward", mutates_args=(), device_types="cpu")
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    codes: Tensor | None,
    scale: float,
    do: Tensor,
    dfinal: Tensor,
) -> list[Tensor]:
    """Gradients of the eight first inputs; those of inputs left out have no elements."""
    new = torch.empty if codes is None else torch.zeros
    gradients = [
        torch.empty([0] * rank) if x is None else new(x.shape, dtype=torch.float32)
        for x, rank in zip((q, k, v, a, b, beta, log_decay, state), _RANKS, strict=True)
    ]
    arguments = _arguments(q, k, v, a, b, beta, log_decay, codes, state, scale)
    upstream = kernels.array(do), kernels.array(dfinal)
    _run(_backward, q, v, *arguments, *upstream, *(x.numpy() for x in gradients))
    return gradients


@backward_op.register_fake
def _(q, k, v, a, b, beta, log_decay, state, codes, scale, do, dfinal):
    inputs = (q, k, v, a, b, beta, log_decay, state)
    return [q.new_empty([0] * rank if x is None else x.shape) for x, rank in zip(inputs, _RANKS, strict=True)]


_RANKS = (4, 4, 4, 4, 4, 3, 4, 4)  # axes of q, k, v, a, b, beta, log_decay, state


def _run(kernel, q: Tensor, v: Tensor, *arguments) -> None:
    problems = q.shape[0] * q.shape[2]
    if q.numel() * v.shape[-1] < 2**19:  # a step: waking a thread takes longer than the work
        kernel(0, problems, *arguments)
    else:
        kernels.run(kernel, problems, *arguments)


def _arguments(q, k, v, a, b, beta, log_decay, codes, state, scale):
    """What both kernels take first. What is left out becomes an array without elements, so that types never change."""

    def optional(x: Tensor | None, rank: int) -> np.ndarray:
        return np.zeros([0] * rank, np.float32) if x is None else kernels.array(x)

    flags = np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)
    padded = kernels.pad(q.shape[-1]), kernels.pad(v.shape[-1])
    inputs = [kernels.array(x) for x in (q, k, v)]
    options = [optional(x, rank) for x, rank in zip((a, b, beta, log_decay), (4, 4, 3, 4), strict=True)]
    return (*inputs, *options, flags, kernels.array(state), np.float32(scale), padded)


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, do, dfinal):
    *inputs, codes = ctx.saved_tensors
    if not torch.is_grad_enabled():
        found = backward_op(*inputs, codes, ctx.scale, do, dfinal)
        return *(None if x is None else dx for x, dx in zip(inputs, found, strict=True)), None, None
    segments = None if codes is None else Segments(codes == 1, codes != 2)

    def form(q, k, v, a, b, beta, log_decay, state):
        g = q.new_zeros(()).expand(*q.shape[:3], 1) if log_decay is None else log_decay
        if a is None:
            return parallel.delta_rule(q, k, v, beta, g, ctx.scale, state, segments)
        return parallel.dplr(q, k, v, a, b, g, ctx.scale, state, segments)

    return *kernels.differentiable_gradients(form, inputs, (do, dfinal)), None, None


forward_op.register_autograd(_gradients, setup_context=_setup)
