"""State space models with full matrices as fused CPU kernels, forward and backward.

A problem is a channel. Its tokens are cut into pieces of at most Q, which end where a document does, and lie side by
side as rows of a matrix, whatever row of the batch they come from. So nearly everything is a product of matrices
(tiles.py) with what tables.py makes of the channel's own. A piece that is not the last of its document has exactly Q
tokens; only a row's last one needs the state at another length, for which powers of two are multiplied.

Backward makes tables and states once more: nothing is kept but the inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tidegate.ops import kernels
from tidegate.ops.chunks import clear
from tidegate.ops.dense_ssm import parallel
from tidegate.ops.dense_ssm.tables import (
    add_times,
    gradient_places,
    gradients_of_tables,
    make_tables,
    places,
    times,
    turn_tables,
)
from tidegate.ops.kernels import copy_floats, jit_inside, jit_views
from tidegate.ops.tiles import product, transpose
from tidegate.segments import Segments

LONGEST = 64  # tokens of a piece
FRESH, CONTINUES = -1, -2  # instead of the row whose state a piece begins with

lower_times = product(keep="lower")


def dense_ssm(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    return _forward_op(u, a, b, c, state, None if segments is None else segments.codes())


# -- pieces ------------------------------------------------------------------------------------------------------------
class Pieces(NamedTuple):
    """Q; where the real tokens are (None: everywhere) and where they go; and for the kernels: what each piece begins
    with, and each row's last piece, -1 if it has none, with its length."""

    size: int
    tokens: Tensor | None
    slots: Tensor | None
    begins: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray


def _pieces(batch: int, time: int, codes: Tensor | None) -> Pieces:
    if codes is None:
        size = _size(time)
        count = -(-time // size)
        begins = np.full((batch, count), CONTINUES)
        begins[:, 0] = np.arange(batch)
        ends = np.arange(1, batch + 1) * count - 1
        return Pieces(size, None, None, begins.reshape(-1), ends, np.full(batch, time - (count - 1) * size))
    flags = codes.numpy().reshape(-1)
    tokens = np.flatnonzero(flags != 2)
    rows, starts, index = tokens // time, flags[tokens] == 1, np.arange(len(tokens))
    enters = np.diff(rows, prepend=-1) != 0
    position = index - np.maximum.accumulate(np.where(starts | enters, index, 0))
    size = _size(int(position.max(initial=0)) + 1)
    first = position % size == 0
    piece = np.cumsum(first) - 1
    begins = np.where(starts, FRESH, np.where(enters, rows, CONTINUES))[first]
    ends, lengths = np.full(batch, -1), np.zeros(batch, np.int64)
    ends[rows], lengths[rows] = piece, position % size + 1  # the last one stays
    slots = piece * size + position % size
    return Pieces(size, torch.from_numpy(tokens), torch.from_numpy(slots), begins, ends, lengths)


def _size(longest: int) -> int:
    """The least power of two that is not shorter, up to LONGEST."""
    return min(LONGEST, 1 << (longest - 1).bit_length())


def _cut(x: Tensor, pieces: Pieces) -> Tensor:
    """(B, T, D, ...) -> (D ..., P, Q), zeros where there is no token."""
    size, count, x = pieces.size, len(pieces.begins), x.flatten(2)
    if pieces.tokens is None or pieces.slots is None:
        rows = pad(x, (0, 0, 0, -x.shape[1] % size)).flatten(0, 1)
    else:
        rows = x.new_zeros(count * size, x.shape[2])
        rows = rows.index_copy(0, pieces.slots, x.flatten(0, 1)[pieces.tokens])
    # Turned as a matrix: PyTorch does that four times as fast as the same with more axes.
    return rows.t().contiguous().view(x.shape[2], count, size)


def _joined(x: Tensor, batch: int, time: int, pieces: Pieces) -> Tensor:
    """The way back, zeros on padding: (D, P, Q) -> (B, T, D)."""
    rows = x.flatten(1).t().contiguous()
    if pieces.tokens is None or pieces.slots is None:
        whole = -(-time // pieces.size) * pieces.size
        return rows.view(batch, whole, x.shape[0])[:, :time].contiguous()
    found = x.new_zeros(batch * time, x.shape[0])
    return found.index_copy(0, pieces.tokens, rows[pieces.slots]).view(batch, time, x.shape[0])


# -- kernels -----------------------------------------------------------------------------------------------------------
@jit_inside
def _states(x, d, dims, u, begins, state, channels):
    """H[p], the state before each piece."""
    N, M, Q, levels, P = dims
    Np, _, X, _, _, H, _ = places(N, M, Q, levels, P)
    size, none = Np * Np, (x, 0, 0)
    if P > 1:
        times(P - 1, N, (x, H + Np, Np), (u, d * P * Q, Q, 1), (x, X + (Q - 1) * Np, -Np), Q, (), none)
    for p in range(P):
        h, begin = H + p * Np, begins[p]
        if begin == FRESH:
            clear(1, N, ((x, h, 0),), ())
        elif begin == CONTINUES:
            add_times(1, N, (x, h, Np), (x, h - Np, 0, 1), (x, levels * size, Np), N, (), none)
        else:
            copy_floats(state, (begin * channels + d) * N, x, h, N)


@jit_views
def _forward(begin, end, x, dims, u, a, b, c, state, begins, ends, lengths, y, last):
    N, M, Q, levels, P = dims
    Np, Qp, X, E, K, H, _ = places(N, M, Q, levels, P)
    size, none, channels, row = Np * Np, (x, 0, 0), a.size // (N * N), H + P * Np
    for d in range(begin, end):
        make_tables(x, d, dims, a, b, c)
        _states(x, d, dims, u, begins, state, channels)
        for m in range(M):
            times(
                *(P, Q, (y, (d * M + m) * P * Q, Q), (u, d * P * Q, Q, 1), (x, K + (2 * m + 1) * Qp, -1), Q),
                *(((x, H, Np, 1), (x, E + m * Np * Qp, Qp), N), none),
            )
        for r in range(len(ends)):
            at, p, n = (r * channels + d) * N, ends[r], lengths[r]
            if p < 0:
                copy_floats(state, at, last, at, N)
                continue
            copy_floats(x, H + p * Np, x, row, N)
            for j in range(levels + 1):
                if n >> j & 1:
                    times(1, N, (last, at, N), (x, row, 0, 1), (x, j * size, Np), N, (), none)
                    copy_floats(last, at, x, row, N)
            add_times(1, N, (last, at, N), (u, (d * P + p) * Q, 0, 1), (x, X + (n - 1) * Np, -Np), n, (), none)


@jit_inside
def _end(x, d, dims, p, n, u, dlast, at, du):
    """The gradient of a row's last state, after n tokens of piece p."""
    N, M, Q, levels, P = dims
    Np, Qp, _, _, _, H, _ = places(N, M, Q, levels, P)
    turned, XT, _, _, dW, dX, _, _, G, _, _, row, _ = gradient_places(N, M, Q, levels, P)
    size, none, token = Np * Np, (x, 0, 0), (d * P + p) * Q
    add_times(n, N, (x, dX, Np), (u, token + n - 1, -1, 0), (dlast, at, 0), 1, (), none)
    add_times(1, n, (du, token, Q), (dlast, at, 0, 1), (x, XT + Q - n, Qp), N, (), none)
    # The state before the piece has gone through one power for each bit of n.
    flow = row + (levels + 2) * Np
    copy_floats(x, H + p * Np, x, row, N)
    copy_floats(dlast, at, x, flow, N)
    step = row
    for j in range(levels + 1):
        if n >> j & 1:
            times(1, N, (x, step + Np, Np), (x, step, 0, 1), (x, j * size, Np), N, (), none)
            step += Np
    for j in range(levels, -1, -1):
        if n >> j & 1:
            step -= Np
            add_times(N, N, (x, dW + j * size, Np), (x, step, 1, 0), (x, flow, 0), 1, (), none)
            times(N, 1, (x, turned, 1), (x, j * size, Np, 1), (x, flow, 1), N, (), none)
            copy_floats(x, turned, x, flow, N)
    for i in range(N):
        x[G + p * Np + i] += x[flow + i]


@jit_views
def _backward(
    begin, end, x, dims, u, a, b, c, state, begins, ends, lengths, dy, dlast, du, da, db, dc, dstate
):  # fmt: skip
    N, M, Q, levels, P = dims
    Np, Qp, _, _, _, H, _ = places(N, M, Q, levels, P)
    turned, XT, E, KR, dW, dX, dE, dK, G, after, pairs, _, _ = gradient_places(N, M, Q, levels, P)
    size, none, channels = Np * Np, (x, 0, 0), a.size // (N * N)
    for d in range(begin, end):
        token = d * P * Q
        make_tables(x, d, dims, a, b, c)
        _states(x, d, dims, u, begins, state, channels)
        turn_tables(x, dims)
        clear((levels + 1) * Np, Np, ((x, dW, Np),), ())
        clear(Qp, Np, ((x, dX, Np),), ())
        clear(P, N, ((x, G, Np),), ())
        clear(P, Q, ((du, token, Q),), ())
        # 1. What the outputs give to the states before pieces, to inputs, E and K.
        for m in range(M):
            upstream = (d * M + m) * P * Q
            add_times(P, N, (x, G, Np), (dy, upstream, Q, 1), (x, E + m * Qp * Np, Np), Q, (), none)
            add_times(P, Q, (du, token, Q), (dy, upstream, Q, 1), (x, KR + 2 * m * Qp + Q - 1, -1), Q, (), none)
            times(Q, N, (x, dE + m * Qp * Np, Np), (dy, upstream, 1, Q), (x, H, Np), P, (), none)
            lower_times(Q, Q, (x, pairs, Qp), (dy, upstream, 1, Q), (u, token, Q), P, (), none)
            sums = dK + m * Qp
            clear(1, Q, ((x, sums, 0),), ())
            for t in range(Q):
                for s in range(t + 1):
                    x[sums + Q - 1 - t + s] += x[pairs + t * Qp + s]
        # 2. The last states.
        for r in range(len(ends)):
            at = (r * channels + d) * N
            if ends[r] < 0:
                copy_floats(dlast, at, dstate, at, N)
            else:
                clear(1, N, ((dstate, at, 0),), ())
                _end(x, d, dims, ends[r], lengths[r], u, dlast, at, du)
        # 3. From piece to piece, backwards; `after` gets what the state after a piece gives to the next.
        transpose(N, N, (x, turned, Np), (x, levels * size, Np))
        clear(P, N, ((x, after, Np),), ())
        for p in range(P - 1, -1, -1):
            g = G + p * Np
            if begins[p] == CONTINUES:
                copy_floats(x, g, x, after + (p - 1) * Np, N)
                add_times(1, N, (x, g - Np, Np), (x, g, 0, 1), (x, turned, Np), N, (), none)
            elif begins[p] != FRESH:
                copy_floats(x, g, dstate, (begins[p] * channels + d) * N, N)
        add_times(N, N, (x, dW + levels * size, Np), (x, H, 1, Np), (x, after, Np), P, (), none)
        add_times(Q, N, (x, dX, Np), (u, token + Q - 1, -1, Q), (x, after, Np), P, (), none)
        add_times(P, Q, (du, token, Q), (x, after, Np, 1), (x, XT, Qp), N, (), none)
        # 4. The tables.
        gradients_of_tables(x, d, dims, a, b, c, da, db, dc)


# -- operators ---------------------------------------------------------------------------------------------------------
def _run(
    kernel: Any, cut: Tensor, pieces: Pieces, a: Tensor, b: Tensor, c: Tensor, state: Tensor, *others: Tensor
) -> None:
    levels = pieces.size.bit_length() - 1
    dims = a.shape[1], c.shape[1], pieces.size, levels, len(pieces.begins)
    inputs = (kernels.flat(x) for x in (cut, a, b, c, state))
    arrays = (*inputs, pieces.begins, pieces.ends, pieces.lengths, *(kernels.flat(x) for x in others))
    end = places if kernel is _forward else gradient_places
    kernels.run(kernel, a.shape[0], dims, *arrays, scratch=end.py_func(*dims)[-1])


@torch.library.custom_op("tidegate::dense_ssm", mutates_args=(), device_types="cpu")
def _forward_op(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, time = u.shape[:2]
    pieces = _pieces(batch, time, codes)
    cut = _cut(u, pieces)
    y, last = torch.empty(c.shape[0] * c.shape[1], *cut.shape[1:]), torch.empty(state.shape)
    _run(_forward, cut, pieces, a, b, c, state, y, last)
    return _joined(y, batch, time, pieces).unflatten(2, c.shape[:2]), last


@torch.library.custom_op("tidegate::dense_ssm_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, codes: Tensor | None, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time = u.shape[:2]
    pieces = _pieces(batch, time, codes)
    cut = _cut(u, pieces)
    du, da, dstate = torch.empty(cut.shape), torch.empty(a.shape), torch.empty(state.shape)
    db, dc = torch.zeros(b.shape), torch.zeros(c.shape)
    _run(_backward, cut, pieces, a, b, c, state, _cut(dy, pieces), dlast, du, da, db, dc, dstate)
    return _joined(du, batch, time, pieces), da, db, dc, dstate


@_forward_op.register_fake
def _(u, a, b, c, state, codes):
    return u.new_empty(*u.shape, c.shape[1]), state.new_empty(state.shape)


@_backward_op.register_fake
def _(u, a, b, c, state, codes, dy, dlast):
    return tuple(x.new_empty(x.shape) for x in (u, a, b, c, state))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_formula(ctx, dy, dlast):
    *inputs, codes = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return *_backward_op(*inputs, codes, dy, dlast), None
    segments = None if codes is None else Segments(codes == 1, codes != 2)

    def form(*inputs):
        return parallel.dense_ssm(*inputs, segments)

    return *kernels.differentiable_gradients(form, inputs, (dy, dlast)), None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
