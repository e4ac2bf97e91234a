"""mLSTM on the CPU: the kernels of linear attention for the memory, a sweep over keys for gates and normaliser.

The normaliser could be one more column of the memory, but columns come in full vectors: a 65th costs as much as 16.
As a recurrence of its own it is K numbers that stay in cache. It does not need the memory, so it goes first, and
queries are divided by the denominator before they are asked: outputs come out divided, and no pass over them is needed.

Gradients as in parallel.py: m is a constant of the sums, and d m is what eps and the final state owe to it, handed back
along the maxima to where they came from.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import copy_floats, exp32, jit, jit_views, wide_vectors
from tidegate.ops.linear_attention import numba_cpu as outer_products
from tidegate.ops.mlstm import parallel
from tidegate.segments import Segments

ZERO = np.float32(0.0)
DECAY, MAXIMUM, PRODUCT, READ = range(4)  # kept of every token and head: log f, m, scale q . n, scale / denominator


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit
def forward_kernel(begin, end, q, k, log_input, log_decay, codes, n0, m0, scale, eps, queries, keys, kept, n, m):
    width = k.shape[3]
    for problem in range(begin, end):
        b, h = problem // k.shape[2], problem % k.shape[2]
        copy_floats(n0, problem * width, n, problem * width, width)
        m[b, h] = gate(b, h, q, k, log_input, log_decay, codes, m0[b, h], scale, eps, queries, keys, kept, n[b, h])


@jit_views
def gate(b, h, q, k, log_input, log_decay, codes, m, scale, eps, queries, keys, kept, n):
    """One head, token by token: keys times i, queries over the denominator. n is left as it is last, m returned."""
    wide_vectors()
    time, width = k.shape[1], k.shape[3]
    for t in range(time):
        if codes.shape[0] > 0:
            if codes[b, t] == 2:
                kept[DECAY, b, t, h], kept[MAXIMUM, b, t, h] = ZERO, m
                kept[PRODUCT, b, t, h], kept[READ, b, t, h] = ZERO, ZERO
                continue
            if codes[b, t] == 1:
                m = ZERO
                for c in range(width):
                    n[c] = ZERO
        carried, written = m + log_decay[b, t, h], log_input[b, t, h]
        new = carried if carried > written else written
        decay = (m - new) + log_decay[b, t, h]  # the difference first: it is exact where the carried maximum wins
        m = new
        keep, write, product = exp32(decay), exp32(written - m), ZERO
        kt, qt, key, query = k[b, t, h], q[b, t, h], keys[b, t, h], queries[b, t, h]
        for c in range(width):
            key[c] = write * kt[c]
        for c in range(width):
            n[c] = keep * n[c] + write * kt[c]
        for c in range(width):
            product += qt[c] * n[c]
        product *= scale
        read = scale / (max(abs(product), exp32(-m)) + eps)
        for c in range(width):
            query[c] = read * qt[c]
        kept[DECAY, b, t, h], kept[MAXIMUM, b, t, h] = decay, m
        kept[PRODUCT, b, t, h], kept[READ, b, t, h] = product, read
    return m


@jit
def backward_kernel(
    begin, end, q, log_input, queries, keys, kept, codes, n0, n, dn, dm, scale, eps, dq, dk, di, df, dd, dn0, dm0
):
    width = q.shape[3]
    scratch = np.empty(width, np.float32)
    for problem in range(begin, end):
        b, h = problem // q.shape[2], problem % q.shape[2]
        copy_floats(n0, problem * width, scratch, 0, width)
        read_gradients(b, h, queries, keys, kept, codes, scale, scratch, dq, dd)
        copy_floats(dn, problem * width, dn0, problem * width, width)
        flows = dn0[b, h], dm[b, h]
        dm0[b, h] = write_gradients(b, h, q, log_input, keys, kept, codes, scale, eps, n[b, h], flows, dk, di, df, dd)


@jit_views
def read_gradients(b, h, queries, keys, kept, codes, scale, n, dq, dd):
    """From the first token to the last: dq from that of the divided queries, dd of the denominators."""
    wide_vectors()
    time, width = keys.shape[1], keys.shape[3]
    for t in range(time):
        if codes.shape[0] > 0:
            if codes[b, t] == 2:
                continue
            if codes[b, t] == 1:
                for c in range(width):
                    n[c] = ZERO
        keep, read, product = exp32(kept[DECAY, b, t, h]), kept[READ, b, t, h], ZERO
        key, query, out = keys[b, t, h], queries[b, t, h], dq[b, t, h]
        for c in range(width):
            product += query[c] * out[c]  # = h . dh
        dd[b, t, h] = -product * read / scale
        share = scale * through_product(kept, b, t, h, dd)
        for c in range(width):
            n[c] = keep * n[c] + key[c]
        for c in range(width):
            out[c] = read * out[c] + share * n[c]


@jit_views
def write_gradients(b, h, q, log_input, keys, kept, codes, scale, eps, n, flows, dk, di, df, dd):
    """From the last token to the first: what was written, how it decayed, and the maxima.

    dk and df come with what the memory contributes. `flows` are the gradients of n and m, as they arrive from the
    right; that of n is updated in place, that of the initial m returned.
    """
    wide_vectors()
    time, width = q.shape[1], q.shape[3]
    dn, dm = flows
    decayed = ZERO  # dn_t . f_t n_{t-1}, the normaliser's part in the gradient of log f_t
    for c in range(width):
        decayed += dn[c] * n[c]
    for t in range(time - 1, -1, -1):
        code = codes[b, t] if codes.shape[0] > 0 else 0
        if code == 2:
            continue
        m, written = kept[MAXIMUM, b, t, h], log_input[b, t, h]
        keep, write, share = exp32(kept[DECAY, b, t, h]), exp32(written - m), through_product(kept, b, t, h, dd)
        qt, key, out = q[b, t, h], keys[b, t, h], dk[b, t, h]
        new, total = ZERO, ZERO
        for c in range(width):
            dn[c] += share * scale * qt[c]
        for c in range(width):
            new += dn[c] * key[c]
        for c in range(width):
            out[c] += dn[c]
        for c in range(width):
            total += out[c] * key[c]
        for c in range(width):
            out[c] *= write
        decayed += share * kept[PRODUCT, b, t, h] - new
        dm += eps * dd[b, t, h]
        if code == 1:  # nothing came from before
            keep, decayed = ZERO, ZERO
        for c in range(width):
            dn[c] *= keep
        df[b, t, h, 0] += decayed
        di[b, t, h] = total
        if m > written:
            df[b, t, h, 0] += dm
        else:
            di[b, t, h] += dm
        if code == 1 or not m > written:
            dm = ZERO
    return dm


@jit_views
def through_product(kept, b, t, h, dd):
    """The gradient of scale q . n; none where the floor exp(-m) is larger."""
    product = kept[PRODUCT, b, t, h]
    return dd[b, t, h] * np.sign(product) if abs(product) > exp32(-kept[MAXIMUM, b, t, h]) else ZERO


# -- operators ---------------------------------------------------------------------------------------------------------
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    maximum: Tensor,
    scale: float,
    eps: float,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (B, T, H, K), v (B, T, H, V), gates (B, T, H), memory (B, H, K, V), normaliser (B, H, K), maximum (B, H)."""
    codes = None if segments is None else segments.codes()
    return forward_op(q, k, v, log_input, log_decay, memory, normaliser, maximum, codes, scale, eps)[:4]


@torch.library.custom_op("tidegate::mlstm", mutates_args=(), device_types="cpu")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    maximum: Tensor,
    codes: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, the final state, and (4, B, T, H) for the backward pass."""
    queries, keys, kept = torch.empty(q.shape), torch.empty(k.shape), torch.empty(4, *k.shape[:3])
    n, m = torch.empty(normaliser.shape), torch.empty(maximum.shape)
    inputs = [kernels.array(x) for x in (q, k, log_input, log_decay)]
    state = [kernels.array(x) for x in (normaliser, maximum)]
    results = [x.numpy() for x in (queries, keys, kept, n, m)]
    numbers = np.float32(scale), np.float32(eps)
    kernels.run(forward_kernel, maximum.numel(), *inputs, _flags(codes), *state, *numbers, *results)
    h, memory = outer_products.forward_op(queries, keys, v, kept[DECAY, ..., None], memory, codes, 1.0)
    return h, memory, n, m, kept


@forward_op.register_fake
def _(q, k, v, log_input, log_decay, memory, normaliser, maximum, codes, scale, eps):
    shapes = (v.shape, memory.shape, normaliser.shape, maximum.shape, (4, *k.shape[:3]))
    return tuple(q.new_empty(shape) for shape in shapes)


@torch.library.custom_op("tidegate::mlstm_backward", mutates_args=(), device_types="cpu")
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    state: list[Tensor],
    codes: Tensor | None,
    scale: float,
    eps: float,
    results: list[Tensor],
    gradients: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (memory, normaliser), (memory_last, n_last, kept), (dh, dmemory, dn, dm) = state, results, gradients
    queries = q * kept[READ, ..., None]
    keys = k * torch.exp(log_input - kept[MAXIMUM])[..., None]
    dq, dk, dv, df, dmemory_first = outer_products.backward_op(
        queries, keys, v, kept[DECAY, ..., None], memory, codes, 1.0, memory_last, dh, dmemory
    )
    # C and n of the final state are kept relative to m, as are those of the initial one.
    dm = dm - _inner(memory_last, dmemory) - _inner(n_last, dn)
    new = torch.empty if codes is None else torch.zeros  # no sweep writes on padding
    di, dd, dn_first, dm_first = (new(x.shape) for x in (log_input, log_input, dn, dm))
    inputs = [kernels.array(x) for x in (q, log_input, queries, keys, kept)]
    others = [kernels.array(x) for x in (normaliser, n_last, dn, dm)]
    outputs = [x.numpy() for x in (dq, dk, di, df, dd, dn_first, dm_first)]
    numbers = np.float32(scale), np.float32(eps)
    kernels.run(backward_kernel, dm.numel(), *inputs, _flags(codes), *others, *numbers, *outputs)
    dm_first += _inner(memory, dmemory_first) + _inner(normaliser, dn_first)
    return dq, dk, dv, di, df.squeeze(-1), dmemory_first, dn_first, dm_first


@backward_op.register_fake
def _(q, k, v, log_input, state, codes, scale, eps, results, gradients):
    maximum = state[1].new_empty(state[1].shape[:2])
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_input)) + tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (log_input, *state, maximum)
    )


def _flags(codes: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), np.uint8) if codes is None else kernels.array(codes)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two states, (B, H)."""
    return torch.linalg.vecdot(a.flatten(2), b.flatten(2))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.eps = inputs
    _, memory, n, _, kept = output
    ctx.save_for_backward(*tensors, memory, n, kept)


def _backward(ctx, dh, dmemory, dn, dm, _):
    *inputs, codes, memory_last, n_last, kept = ctx.saved_tensors
    gradients = [dh, dmemory, dn, dm]
    if torch.is_grad_enabled():  # a second derivative is wanted: only the PyTorch form has one
        segments = None if codes is None else Segments(codes == 1, codes != 2)
        found = kernels.differentiable_gradients(
            lambda *tensors: parallel.mlstm(*tensors, ctx.scale, ctx.eps, segments), inputs, tuple(gradients)
        )
        return *found, None, None, None
    q, k, v, log_input, _, memory, normaliser, _ = inputs
    results = [memory_last, n_last, kept]
    found = backward_op(q, k, v, log_input, [memory, normaliser], codes, ctx.scale, ctx.eps, results, gradients)
    return *found, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup)
