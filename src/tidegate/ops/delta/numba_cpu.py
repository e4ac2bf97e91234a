"""CPU kernels of the diagonal-plus-rank-one recurrence: chunks of up to 16 tokens, the state stays in cache.

One (batch, head) pair is one problem; forward, where pairs do not fill the threads evenly, columns of values are split
as well (what depends on keys alone is then computed once per thread). The backward pass keeps the chunks' corrections
and every fourth state, and walks the chunks in reverse with the adjoint of each chunk's equations (chunk.py). Gradients
of keys are sums over values, so it is one problem per pair.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.chunks import CHUNK, clear, fill_ones, multiply
from tidegate.ops.delta import parallel
from tidegate.ops.delta.chunk import DELTA, ONE, TIED, UNTIED, advance, find_chunk, load, places
from tidegate.ops.delta.reverse import BLOCK, reverse, scratch_of_chunk
from tidegate.ops.kernels import LANES, jit_views
from tidegate.ops.passes import prefetch
from tidegate.segments import Segments


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit_views
def forward_kernel(begin, end, x, dims, q, k, v, a, b, beta, g, codes, state, scale, o, final):
    T, H, K, V, G, form = dims
    parts = -(-V // LANES)
    Kp, Vp = -(-K // LANES) * LANES, parts * LANES
    turned = places(K, V)[11]
    S, M = places(K, V)[10], turned + Kp * CHUNK
    zero = np.int64(0)  # a literal would be a type of its own, and compile everything again
    fill_ones(1, Kp, ((x, 0, 0),), ())
    while begin < end:
        problem = begin // parts
        first = (begin - problem * parts) * LANES
        columns = min((end - problem * parts) * LANES, V) - first
        begin = min(end, (problem + 1) * parts)
        i, h, at = problem // H, problem % H, problem * K * V + first
        multiply(K, columns, ((x, S, Vp),), ((state, at, V), ONE))
        t = zero
        while t < T:
            code = codes[i * T + t] if codes.size > 0 else 0
            if code == 2:
                t += 1
                continue
            token = (i * T + t) * H + h
            ahead = token + 2 * CHUNK * H
            prefetch(CHUNK, K, (q, ahead * K, H * K))
            prefetch(CHUNK, K, (k, ahead * K, H * K))
            prefetch(CHUNK, columns, (v, ahead * V + first, H * V))
            prefetch(CHUNK, columns, (o, ahead * V + first, H * V))
            prefetch(CHUNK, G, (g, ahead * G, H * G))
            if form != DELTA:
                prefetch(CHUNK, K, (a, ahead * K, H * K))
            if form == UNTIED:
                prefetch(CHUNK, K, (b, ahead * K, H * K))
            n, strong = find_chunk(x, zero, dims, g, codes, i, h, t)
            if code == 1:
                clear(K, columns, ((x, S, Vp),), ())
            load(x, zero, dims, n, token, q, k, a, b, beta, g, scale)
            advance(x, zero, S, dims, n, strong, token, first, columns, v, g, turned, M, o)
            t += n
        multiply(K, columns, ((final, at, V),), ((x, S, Vp), ONE))


@jit_views
def count_kernel(begin, end, x, dims, g, codes, counts):
    """How many chunks each problem has."""
    T, H, _, _, _, _ = dims
    zero = np.int64(0)
    for problem in range(begin, end):
        t = count = zero
        while t < T:
            if codes.size > 0 and codes[problem // H * T + t] == 2:
                t += 1
                continue
            t += find_chunk(x, zero, dims, g, codes, problem // H, problem % H, t)[0]
            count += 1
        counts[problem] = count


@jit_views
def backward_kernel(
    begin, end, x, dims, most, q, k, v, a, b, beta, g, codes, state, scale,
    do, dfinal, dq, dk, dv, da, db, dbeta, dg, dstate,
):  # fmt: skip
    """`most` chunks at most in a problem."""
    T, H, K, V, _, _ = dims
    zero = np.int64(0)
    Kp, Vp = -(-K // LANES) * LANES, -(-V // LANES) * LANES
    size = places(K, V)[11]
    rest = BLOCK * size + scratch_of_chunk(Kp, Vp)
    writes, kept = rest, rest + T * Vp
    table = kept + -(-most // BLOCK) * Kp * Vp
    chunks = x[table : table + 2 * most].view(np.int32).reshape(2, most)
    turned = BLOCK * size
    M, none = turned + max(Kp, Vp) * CHUNK, q[:0]
    for slot in range(BLOCK):
        fill_ones(1, Kp, ((x, slot * size, 0),), ())
    S, Z = places(K, V)[10], places(K, V)[9]
    for problem in range(begin, end):
        # Forward again, keeping the corrections and every BLOCK-th state.
        i, h, at = problem // H, problem % H, problem * K * V
        multiply(K, V, ((x, S, Vp),), ((state, at, V), ONE))
        t = count = zero
        while t < T:
            code = codes[i * T + t] if codes.size > 0 else 0
            if code == 2:
                t += 1
                continue
            token = (i * T + t) * H + h
            ahead = token + 2 * CHUNK * H
            prefetch(CHUNK, K, (k, ahead * K, H * K))
            prefetch(CHUNK, V, (v, ahead * V, H * V))
            n, strong = find_chunk(x, zero, dims, g, codes, i, h, t)
            chunks[0, count], chunks[1, count] = t, -n if strong else n
            if code == 1:
                clear(K, V, ((x, S, Vp),), ())
            if count % BLOCK == 0:
                multiply(K, V, ((x, kept + count // BLOCK * Kp * Vp, Vp),), ((x, S, Vp), ONE))
            load(x, zero, dims, n, token, q, k, a, b, beta, g, scale)
            advance(x, zero, S, dims, n, strong, token, zero, V, v, g, turned, M, none)
            multiply(n, V, ((x, writes + t * Vp, Vp),), ((x, Z, Vp), ONE))
            count += 1
            t += n
        reverse(
            x, chunks, dims, i, h, count, writes, kept, q, k, v, a, b, beta, g, codes, scale,
            do, dfinal, dq, dk, dv, da, db, dbeta, dg, dstate,
        )  # fmt: skip


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
    K, V = kernels.pad(q.shape[-1]), kernels.pad(v.shape[-1])
    scratch = places.py_func(K, V)[-1] + K * CHUNK + 4 * CHUNK**2
    arguments = _arguments(q, k, v, a, b, beta, log_decay, codes, state, scale)
    _run(
        forward_kernel, q, v, *arguments, o.view(-1).numpy(), final.view(-1).numpy(), parts=V // LANES, scratch=scratch
    )
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
    K, V = kernels.pad(q.shape[-1]), kernels.pad(v.shape[-1])
    dims, *arguments = _arguments(q, k, v, a, b, beta, log_decay, codes, state, scale)
    counts = np.zeros(q.shape[0] * q.shape[2], np.int64)
    _run(count_kernel, q, v, dims, *arguments[6:8], counts, scratch=places.py_func(K, V)[-1])
    most = int(counts.max(initial=1))
    scratch = BLOCK * places.py_func(K, V)[-1] + scratch_of_chunk.py_func(K, V)
    scratch += q.shape[1] * V + -(-most // BLOCK) * K * V + 2 * most
    outside = [kernels.flat(do), kernels.flat(dfinal), *(x.view(-1).numpy() for x in gradients)]
    _run(backward_kernel, q, v, dims, most, *arguments, *outside, scratch=scratch)
    return gradients


@backward_op.register_fake
def _(q, k, v, a, b, beta, log_decay, state, codes, scale, do, dfinal):
    inputs = (q, k, v, a, b, beta, log_decay, state)
    return [q.new_empty([0] * rank if x is None else x.shape) for x, rank in zip(inputs, _RANKS, strict=True)]


_RANKS = (4, 4, 4, 4, 4, 3, 4, 4)  # axes of q, k, v, a, b, beta, log_decay, state


def _run(kernel, q: Tensor, v: Tensor, *arguments, parts: int = 1, scratch: int) -> None:
    problems = q.shape[0] * q.shape[2]
    if q.numel() * v.shape[-1] < 2**19:  # a step: waking a thread takes longer than the work
        kernels.run_here(kernel, problems, *arguments, parts=parts, scratch=scratch)
    else:
        kernels.run(kernel, problems, *arguments, parts=parts, scratch=scratch)


def _arguments(q, k, v, a, b, beta, log_decay, codes, state, scale):
    """What both kernels take first. What is left out becomes an array without elements, so that types never change."""

    def optional(x: Tensor | None) -> np.ndarray:
        return np.zeros(0, np.float32) if x is None else kernels.flat(x)

    (batch, time, heads, keys), values = q.shape, v.shape[-1]
    form = DELTA if a is None else TIED if b is None else UNTIED
    dims = (time, heads, keys, values, 1 if log_decay is None else log_decay.shape[-1], form)
    decay = np.zeros(batch * time * heads, np.float32) if log_decay is None else kernels.flat(log_decay)
    flags = np.zeros(0, np.uint8) if codes is None else kernels.flat(codes)
    inputs = [kernels.flat(x) for x in (q, k, v)]
    options = [optional(x) for x in (a, b, beta)]
    return (dims, *inputs, *options, decay, flags, kernels.flat(state), np.float32(scale))


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
