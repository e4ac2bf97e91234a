"""The backward pass over one problem's chunks, from the last to the first.

R is the gradient of the state after a chunk. With R' = e^G_end R and the chunk's equations (chunk.py), tied form,

    dZ = k' R' + lower(Q k'^T)^T do             dA S^T, the gradient of A S: dX = (I - strict(A k'^T)^T)^-1 dZ = dv
    P = lower(do Z^T)                           N = strict(dX Z^T)
    dQ = do S^T + P k'                          dA = dX S^T + N k'              dk' = Z R'^T + P^T Q + N^T A
    R <- R' + Q^T do + A^T dX

and the gradient of the log decays is the reverse cumulative sum of Q dQ + A dA - k' dk' - b' db' (A's own from the
token before on, where it reads before the decay), started at the rows' sums of S R at the chunk's end.
"""

from __future__ import annotations

import numpy as np

from tidegate.ops.chunks import CHUNK, clear, dot, exp_of, multiply
from tidegate.ops.delta.chunk import (
    DELTA,
    ONE,
    UNTIED,
    add,
    add_later,
    decay_rows,
    find_chunk,
    load,
    lower,
    pairs,
    places,
    read_earlier,
    read_later,
    scale_rows,
    solve_later,
    strict,
    write,
)
from tidegate.ops.kernels import LANES, jit_inside
from tidegate.ops.passes import elementwise, prefetch
from tidegate.ops.tiles import product, transpose

BLOCK = 4  # chunks between two kept states

add_pair = product(start="add")  # called with two products


# -- passes ------------------------------------------------------------------------------------------------------------
def _difference(x, dx, y, dy):
    return x * dx - y * dy


def _subtract(x, y, dy):
    return x - y * dy


def _add_product(x, y, factor):
    return x + y * factor


def _sum(x):
    return x


def _accumulate_with_own(total, x, a, da):
    total = total + x + a * da
    return total, total


def _accumulate_without_own(total, x, a, da):
    total = total + x
    return total + a * da, total


difference, subtract, add_product = elementwise(_difference), elementwise(_subtract), elementwise(_add_product)
sums = elementwise(_sum, total=True)
with_own, without_own = elementwise(_accumulate_with_own, carry=True), elementwise(_accumulate_without_own, carry=True)


@jit_inside
def scratch_of_chunk(Kp, Vp):
    """Floats of scratch beside the chunks of a block: see `reverse`."""
    return 3 * max(Kp, Vp) * CHUNK + 8 * CHUNK * CHUNK + max(Kp, CHUNK) + 5 * CHUNK * Kp + 2 * CHUNK * Vp + 3 * Kp * Vp


@jit_inside
def reverse(
    x, chunks, dims, i, h, count, writes, kept, q, k, v, a, b, beta, g, codes, scale,
    do, dfinal, dq, dk, dv, da, db, dbeta, dg, dstate,
):  # fmt: skip
    """The chunks' begins and sizes, corrections and every BLOCK-th state given, all gradients.

    The states of a block are made again from the kept one.
    """
    T, H, K, V, G, form = dims
    Kp, Vp = -(-K // LANES) * LANES, -(-V // LANES) * LANES
    zero = np.int64(0)  # see forward_kernel
    wide, size = max(Kp, Vp) * CHUNK, places(K, V)[11]
    pair = CHUNK * CHUNK
    turned = BLOCK * size
    M = turned + wide  # strict with k', with b', lower with k', with b'
    dM = M + 4 * pair
    Z_T = dM + 4 * pair
    v_T = Z_T + wide
    total = v_T + wide
    dQ = total + max(Kp, CHUNK)  # also one per token
    dA = dQ + CHUNK * Kp
    dk_ = dA + CHUNK * Kp
    db_ = dk_ + CHUNK * Kp
    D = db_ + CHUNK * Kp
    dZ = D + CHUNK * Kp
    dX = dZ + CHUNK * Vp
    R = dX + CHUNK * Vp
    S_T = R + Kp * Vp
    R_T = S_T + Kp * Vp
    at = (i * H + h) * K * V
    for block in range(-(-count // BLOCK) - 1, -1, -1):
        offset = block * BLOCK
        slots = min(BLOCK, count - offset)
        for slot in range(slots):
            t, n = np.int64(chunks[0, offset + slot]), np.int64(abs(chunks[1, offset + slot]))
            W, token = slot * size, (i * T + t) * H + h
            e, inverse, end, Q, A, k_, b_, step, minus, Z, S, _ = places(K, V)
            find_chunk(x, W, dims, g, codes, i, h, t)
            load(x, W, dims, n, token, q, k, a, b, beta, g, scale)
            multiply(n, V, ((x, W + Z, Vp),), ((x, writes + t * Vp, Vp), ONE))
            if codes.size > 0 and codes[i * T + t] == 1:
                clear(K, V, ((x, W + S, Vp),), ())
            elif slot == 0:
                multiply(K, V, ((x, W + S, Vp),), ((x, kept + block * Kp * Vp, Vp), ONE))
            else:
                before, last = W - size, offset + slot - 1
                multiply(K, V, ((x, W + S, Vp),), ((x, before + S, Vp), ONE))
                token = (i * T + chunks[0, last]) * H + h
                if chunks[1, last] < 0:
                    decay_rows(x, W + S, turned, dims, V, g, token)
                write(x, before, W + S, dims, np.int64(abs(chunks[1, last])), token, zero, V, v)
        if offset + slots == count:  # the state after the last chunk, for the decay's gradient
            W, token, n = (slots - 1) * size, (i * T + chunks[0, count - 1]) * H + h, np.int64(chunks[1, count - 1])
            multiply(K, V, ((x, R, Vp),), ((x, W + places(K, V)[10], Vp), ONE))
            if n < 0:
                decay_rows(x, R, turned, dims, V, g, token)
            write(x, W, R, dims, abs(n), token, zero, V, v)
            dot(K, V, ((x, total),), ((x, R, Vp), (dfinal, at, V)))
            multiply(K, V, ((x, R, Vp),), ((dfinal, at, V), ONE))
        for slot in range(slots - 1, -1, -1):
            t, n = np.int64(chunks[0, offset + slot]), np.int64(abs(chunks[1, offset + slot]))
            strong, W, token = chunks[1, offset + slot] < 0, slot * size, (i * T + t) * H + h
            ask(dims, i, h, max(0, t - BLOCK * CHUNK), q, k, v, a, b, g, do, dq, dk, dv, da, db, dg)
            prefetch(CHUNK, V, (x, writes + max(0, t - BLOCK * CHUNK) * Vp, Vp))
            e, inverse, end, Q, A, k_, b_, step, minus, Z, S, _ = places(K, V)
            e, inverse, end, Q, A, k_, b_ = W + e, W + inverse, W + end, W + Q, W + A, W + k_, W + b_
            step, minus, Z, S = W + step, W + minus, W + Z, W + S
            value, upstream = (v, token * V, H * V), (do, token * V, H * V)
            if strong and form == DELTA:
                decay_rows(x, S, turned, dims, V, g, token)
            pairs(x, W, dims, n, turned, M, do.size > 0)
            system = M + pair if form == UNTIED else M
            clear(CHUNK - n, CHUNK, ((x, system + n * CHUNK, CHUNK),), ())
            clear(CHUNK - n, V, ((x, dX + n * Vp, Vp),), ())
            multiply(K, V, ((x, R, Vp),), ((x, R, Vp), (x, end)))
            # The gradients of the corrections' right side, dX, and of the values, dZ.
            if form == UNTIED:
                read_later(
                    *(n, V, (x, dX, Vp), (x, b_, Kp, 1), (x, R, Vp), K),
                    *(((x, M + 3 * pair, 1, CHUNK), upstream, n), (x, 0, 0)),
                )
                solve_later(V, (x, dX, Vp), (x, system, CHUNK))
                read_later(
                    *(n, V, (x, dZ, Vp), (x, k_, Kp, 1), (x, R, Vp), K),
                    *(((x, M + 2 * pair, 1, CHUNK), upstream, n), (x, 0, 0)),
                )
                add_later(n, V, (x, dZ, Vp), (x, M, 1, CHUNK), (x, dX, Vp), n, (), (x, 0, 0))
                multiply(n, V, ((dv, token * V, H * V),), ((x, dZ, Vp), ONE))
            else:
                read_later(
                    *(n, V, (x, dX, Vp), (x, k_, Kp, 1), (x, R, Vp), K),
                    *(((x, M + 2 * pair, 1, CHUNK), upstream, n), (x, 0, 0)),
                )
                solve_later(V, (x, dX, Vp), (x, system, CHUNK))
                if form == DELTA:
                    multiply(n, V, ((dv, token * V, H * V),), ((x, dX, Vp), (x, step)))
                else:
                    multiply(n, V, ((dv, token * V, H * V),), ((x, dX, Vp), ONE))
            # The gradients of all pairs of rows.
            transpose(n, V, (x, Z_T, CHUNK), (x, Z, Vp))
            if form == UNTIED:
                transpose(n, V, (x, v_T, CHUNK), value)
                lower(
                    *(n, CHUNK, (x, dM + 3 * pair, CHUNK), (do, token * V, H * V, 1), (x, Z_T, CHUNK), V, ()),
                    (x, 0, 0),
                )
                strict(n, CHUNK, (x, dM + pair, CHUNK), (x, dX, Vp, 1), (x, Z_T, CHUNK), V, (), (x, 0, 0))
            with_k = v_T if form == UNTIED else Z_T
            lower(
                *(n, CHUNK, (x, dM + 2 * pair, CHUNK), (do, token * V, H * V, 1), (x, with_k, CHUNK), V, ()),
                (x, 0, 0),
            )
            strict(n, CHUNK, (x, dM, CHUNK), (x, dX, Vp, 1), (x, with_k, CHUNK), V, (), (x, 0, 0))
            # The gradients of the rows.
            transpose(K, V, (x, S_T, Kp), (x, S, Vp))
            transpose(K, V, (x, R_T, Kp), (x, R, Vp))
            read_earlier(
                *(n, K, (x, dA, Kp), (x, dX, Vp, 1), (x, S_T, Kp), V),
                *(((x, dM, CHUNK, 1), (x, k_, Kp), n), (x, 0, 0)),
            )
            if strong and form != DELTA:  # what the query reads has decayed
                exp_of(x, turned, K, g, token * G, G)
                multiply(V, K, ((x, S_T, Kp),), ((x, S_T, Kp), (x, turned, 0)))
            read_earlier(
                *(n, K, (x, dQ, Kp), (do, token * V, H * V, 1), (x, S_T, Kp), V),
                *(((x, dM + 2 * pair, CHUNK, 1), (x, k_, Kp), n), (x, 0, 0)),
            )
            if form == UNTIED:
                read_later(
                    *(n, K, (x, dk_, Kp), (v, token * V, H * V, 1), (x, R_T, Kp), V),
                    *(((x, dM + 2 * pair, 1, CHUNK), (x, Q, Kp), n), (x, 0, 0)),
                )
                read_later(
                    *(n, K, (x, db_, Kp), (x, Z, Vp, 1), (x, R_T, Kp), V),
                    *(((x, dM + 3 * pair, 1, CHUNK), (x, Q, Kp), n), (x, 0, 0)),
                )
                add_later(n, K, (x, db_, Kp), (x, dM + pair, 1, CHUNK), (x, A, Kp), n, (), (x, 0, 0))
                add(n, K, (x, dA, Kp), (x, dM + pair, CHUNK, 1), (x, b_, Kp), n, (), (x, 0, 0))
                add(n, K, (x, dQ, Kp), (x, dM + 3 * pair, CHUNK, 1), (x, b_, Kp), n, (), (x, 0, 0))
            else:
                read_later(
                    *(n, K, (x, dk_, Kp), (x, Z, Vp, 1), (x, R_T, Kp), V),
                    *(((x, dM + 2 * pair, 1, CHUNK), (x, Q, Kp), n), (x, 0, 0)),
                )
            add_later(n, K, (x, dk_, Kp), (x, dM, 1, CHUNK), (x, A, Kp), n, (), (x, 0, 0))
            if dg.size > 0:
                decay_gradients(x, dims, n, token, Q, A, k_, b_, dQ, total, D, dg)
            # The state before the chunk.
            if strong and form != DELTA:
                add(K, V, (x, R, Vp), (x, Q, 1, Kp), upstream, n, (), (x, 0, 0))
                decay_rows(x, R, turned, dims, V, g, token)
                add(K, V, (x, R, Vp), (x, A, 1, Kp), (x, dX, Vp), n, (), (x, 0, 0))
            else:
                add_pair(*(K, V, (x, R, Vp), (x, Q, 1, Kp), upstream, n, ((x, A, 1, Kp), (x, dX, Vp), n)), (x, 0, 0))
            if codes.size > 0 and codes[i * T + t] == 1:  # nothing came before: the first decay acted on zeros
                clear(K, V, ((x, R, Vp),), ())
                clear(1, K, ((x, total, 0),), ())
                if dg.size > 0:
                    clear(1, G, ((dg, token * G, 0),), ())
            else:
                dot(K, V, ((x, total),), ((x, S, Vp), (x, R, Vp)))
                if strong and form == DELTA:
                    decay_rows(x, R, turned, dims, V, g, token)
            # The gradients of the inputs.
            rows, row = token * K, Kp if G > 1 else 1
            scale_rows((x, dQ, Kp), (dq, rows, H * K), x, n, K, G, e, scale)
            scale_rows((x, dk_, Kp), (dk, rows, H * K), x, n, K, G, inverse, ONE)
            if form == DELTA:
                scale_rows((x, dA, Kp), (x, D, Kp), x, n, K, G, e, ONE)  # of -beta k
                add_product(n, K, ((dk, rows, H * K),), ((dk, rows, H * K), (x, D, Kp), (x, minus)))
                dot(n, V, ((x, dM),), (value, (x, dX, Vp)))
                dot(n, K, ((x, dM + CHUNK),), ((k, rows, H * K), (x, D, Kp)))
                for m in range(n):
                    dbeta[token + m * H] = x[dM + m] - x[dM + CHUNK + m]
            else:
                scale_rows((x, dA, Kp), (da, rows, H * K), x, n, K, G, e - row, ONE)
                if form == UNTIED:
                    scale_rows((x, db_, Kp), (db, rows, H * K), x, n, K, G, inverse, ONE)
    if count == 0:
        multiply(K, V, ((x, R, Vp),), ((dfinal, at, V), ONE))
    multiply(K, V, ((dstate, at, V),), ((x, R, Vp), ONE))


@jit_inside
def ask(dims, i, h, t, q, k, v, a, b, g, do, dq, dk, dv, da, db, dg):
    """Prefetch what the chunk at t reads and writes."""
    T, H, K, V, G, form = dims
    token = (i * T + t) * H + h
    for y in (q, k, dq, dk):
        prefetch(CHUNK, K, (y, token * K, H * K))
    for y in (v, do, dv):
        prefetch(CHUNK, V, (y, token * V, H * V))
    for y in (g, dg):
        prefetch(CHUNK, G, (y, token * G, H * G))
    if form != DELTA:
        for y in (a, da):
            prefetch(CHUNK, K, (y, token * K, H * K))
    if form == UNTIED:
        for y in (b, db):
            prefetch(CHUNK, K, (y, token * K, H * K))


@jit_inside
def decay_gradients(x, dims, n, token, Q, A, k_, b_, dQ, total, D, dg):
    """dg of a chunk; dQ, dA, dk', db' stand one after the other."""
    _, H, K, _, G, form = dims
    Kp = -(-K // LANES) * LANES
    size = CHUNK * Kp
    dA, dk_, db_ = dQ + size, dQ + 2 * size, dQ + 3 * size
    difference(n, K, ((x, D, Kp),), ((x, Q, Kp), (x, dQ, Kp), (x, k_, Kp), (x, dk_, Kp)))
    if form == UNTIED:
        subtract(n, K, ((x, D, Kp),), ((x, D, Kp), (x, b_, Kp), (x, db_, Kp)))
    if G > 1:
        final = (n - 1) * Kp
        outputs = (x, total, 0), (dg, (token + (n - 1) * H) * K, -H * K)
        inputs = (x, D + final, -Kp), (x, A + final, -Kp), (x, dA + final, -Kp)
        if form == DELTA:
            with_own(n, K, outputs, inputs)
        else:
            without_own(n, K, outputs, inputs)
        return
    sum_ = np.float32(0.0)
    for c in range(K):
        sum_ += x[total + c]
    sums(n, K, ((x, total),), ((x, D, Kp),))
    dot(n, K, ((x, D),), ((x, A, Kp), (x, dA, Kp)))
    for m in range(n - 1, -1, -1):
        if form == DELTA:
            sum_ += x[total + m] + x[D + m]
            dg[token + m * H] = sum_
        else:
            sum_ += x[total + m]
            dg[token + m * H] = sum_
            sum_ += x[D + m]
