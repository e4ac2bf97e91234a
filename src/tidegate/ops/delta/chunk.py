"""One chunk of the delta kernels: its decayed rows, its triangular system, its step of the state.

With G_m the cumulative log decay up to and including token m (ops/chunks.py), and S the state before the chunk,

    rows that read       Q = scale q e^G      A = a e^(G before the token)      (delta rule: A = -beta k e^G)
    rows that are written    k' = k e^-G      b' = b e^-G

    U = A S + strict(A k'^T) v + strict(A b'^T) U            the corrections, a unit lower triangular system
    o = Q S + lower(Q k'^T) v + lower(Q b'^T) U              S <- e^G_end (S + k'^T v + b'^T U)

Where corrections are written along k (b is k: `form` below UNTIED), Z = v + U is solved for instead, in one go, and
stands in for both. The delta rule's values are beta v. A first token whose decay is too strong to be part of G has a
chunk of its own; its decay is applied to the state before A reads (delta rule) or after (otherwise).
"""

from __future__ import annotations

import numpy as np

from tidegate.ops.chunks import CHUNK, exp_and_inverse, exp_of, multiply, next_chunk, too_strong
from tidegate.ops.kernels import LANES, jit_inside
from tidegate.ops.passes import elementwise
from tidegate.ops.tiles import product, solve, transpose

ONE = np.float32(1.0)
DELTA, TIED, UNTIED = 0, 1, 2  # forms: the delta rule; corrections along k; along keys of their own

# -- products ----------------------------------------------------------------------------------------------------------
lower, strict = product(keep="lower", narrow=True), product(keep="strict", narrow=True)
read_earlier, read_later = product(shape="lower"), product(shape="upper")
add, add_earlier, add_later = (
    product(start="add"),
    product(start="add", shape="lower"),
    product(start="add", shape="upper"),
)
write_rows = product(start="add", finish="rows")
solve_earlier, solve_later = solve(CHUNK), solve(CHUNK, transposed=True)


# -- passes ------------------------------------------------------------------------------------------------------------
def _scale(x, e, factor):
    return x * e * factor


scale_matrix = elementwise(_scale)


# -- a chunk's place in scratch ----------------------------------------------------------------------------------------
@jit_inside
def places(K, V):
    """Offsets of a chunk's e, 1/e, end, Q, A, k', b', beta, -beta, Z, S; the size of all. Before e come ones."""
    Kp, Vp = -(-K // LANES) * LANES, -(-V // LANES) * LANES
    e = Kp
    inverse = e + CHUNK * Kp
    end = inverse + CHUNK * Kp + Kp
    Q = end + Kp
    A = Q + CHUNK * Kp
    k_ = A + CHUNK * Kp
    b_ = k_ + CHUNK * Kp
    beta = b_ + CHUNK * Kp
    Z = beta + 2 * CHUNK
    S = Z + CHUNK * Vp
    return e, inverse, end, Q, A, k_, b_, beta, beta + CHUNK, Z, S, S + Kp * Vp


@jit_inside
def find_chunk(x, W, dims, g, codes, b, h, t):
    """As ops.chunks.next_chunk; leaves the logs where e will be."""
    T, H, K, V, G, _ = dims
    begin, row = ((b * T + t) * H + h) * G, -(-K // LANES) * LANES if G > 1 else 1
    most = 1 if too_strong(g, begin, G) else T - t
    return next_chunk(x, W + places(K, V)[0], row, g, codes, b * T + t, begin, H * G, G, most)


@jit_inside
def scale_rows(x, o, x_e, n, K, G, e, factor):
    """o = x e factor; one e per row (G = 1) or entry."""
    Kp = -(-K // LANES) * LANES
    if G > 1:
        scale_matrix(n, K, (o,), (x, (x_e, e, Kp), factor))
    else:
        scale_matrix(n, K, (o,), (x, (x_e, e), factor))


@jit_inside
def load(x, W, dims, n, token, q, k, a, b, beta, g, scale):
    """Everything of a chunk that does not depend on values, from the logs that find_chunk left."""
    _, H, K, V, G, form = dims
    Kp = -(-K // LANES) * LANES
    e, inverse, end, Q, A, k_, b_, step, minus, _, _, _ = places(K, V)
    e, inverse, row, stride = W + e, W + inverse, Kp if G > 1 else 1, H * K
    exp_of(x, W + end, K, x, e + (n - 1) * row, G)
    if G > 1:
        exp_and_inverse(n, K, ((x, e, Kp), (x, inverse, Kp)), ((x, e, Kp),))
    else:
        exp_and_inverse(1, n, ((x, e, 0), (x, inverse, 0)), ((x, e, 0),))
    scale_rows((q, token * K, stride), (x, W + Q, Kp), x, n, K, G, e, scale)
    scale_rows((k, token * K, stride), (x, W + k_, Kp), x, n, K, G, inverse, ONE)
    if form == DELTA:
        for m in range(n):
            x[W + step + m] = beta[token + m * H]
            x[W + minus + m] = -beta[token + m * H]
        scale_rows((k, token * K, stride), (x, W + A, Kp), x, n, K, G, e, ONE)
        multiply(n, K, ((x, W + A, Kp),), ((x, W + A, Kp), (x, W + minus)))
    else:
        scale_rows((a, token * K, stride), (x, W + A, Kp), x, n, K, G, e - row, ONE)
        if form == UNTIED:
            scale_rows((b, token * K, stride), (x, W + b_, Kp), x, n, K, G, inverse, ONE)


@jit_inside
def pairs(x, W, dims, n, turned, M, queries):
    """strict(A k'^T), strict(A b'^T), lower(Q k'^T), lower(Q b'^T), one after the other at M."""
    _, _, K, V, _, form = dims
    Kp = -(-K // LANES) * LANES
    _, _, _, Q, A, k_, b_, _, _, _, _, _ = places(K, V)
    size = CHUNK * CHUNK
    for part in range(2 if form == UNTIED else 1):
        at = M + part * size
        transpose(n, K, (x, turned, CHUNK), (x, W + (b_ if part else k_), Kp))
        strict(n, CHUNK, (x, at, CHUNK), (x, W + A, Kp, 1), (x, turned, CHUNK), K, (), (x, 0, 0))
        if queries:
            lower(n, CHUNK, (x, at + 2 * size, CHUNK), (x, W + Q, Kp, 1), (x, turned, CHUNK), K, (), (x, 0, 0))


@jit_inside
def decay_rows(x, S, factors, dims, columns, g, token):
    """S <- w S, for a first token whose decay is left out of G. Leaves w in `factors`."""
    _, _, K, V, G, _ = dims
    Vp = -(-V // LANES) * LANES
    exp_of(x, factors, K, g, token * G, G)
    multiply(K, columns, ((x, S, Vp),), ((x, S, Vp), (x, factors)))


@jit_inside
def write(x, W, S, dims, n, token, first, columns, v):
    """S <- e^G_end (S + k'^T v + b'^T U)."""
    _, H, K, V, _, form = dims
    Kp, Vp = -(-K // LANES) * LANES, -(-V // LANES) * LANES
    _, _, end, _, _, k_, b_, _, _, Z, _, _ = places(K, V)
    end, k_, b_, Z = W + end, W + k_, W + b_, W + Z
    if form == UNTIED:
        value = (v, token * V + first, H * V)
        write_rows(*(K, columns, (x, S, Vp), (x, k_, 1, Kp), value, n, ((x, b_, 1, Kp), (x, Z, Vp), n), (x, end, 0)))
    else:
        write_rows(K, columns, (x, S, Vp), (x, k_, 1, Kp), (x, Z, Vp), n, (), (x, end, 0))


@jit_inside
def advance(x, W, S, dims, n, strong, token, first, columns, v, g, turned, M, o):
    """One chunk of some columns: its corrections, its outputs (unless o is empty) and its end."""
    _, H, K, V, _, form = dims
    Kp, Vp = -(-K // LANES) * LANES, -(-V // LANES) * LANES
    _, _, _, Q, A, _, _, step, _, Z, _, _ = places(K, V)
    Q, A, Z, size = W + Q, W + A, W + Z, CHUNK * CHUNK
    value, out = (v, token * V + first, H * V), (o, token * V + first, H * V)
    pairs(x, W, dims, n, turned, M, o.size > 0)
    if strong and form == DELTA:
        decay_rows(x, S, turned, dims, columns, g, token)
    if form == UNTIED:
        read_earlier(*(n, columns, (x, Z, Vp), (x, A, Kp, 1), (x, S, Vp), K, ((x, M, CHUNK, 1), value, n), (x, 0, 0)))
        solve_earlier(columns, (x, Z, Vp), (x, M + size, CHUNK))
    else:
        if form == DELTA:
            multiply(n, columns, ((x, Z, Vp),), (value, (x, W + step)))
        else:
            multiply(n, columns, ((x, Z, Vp),), (value, ONE))
        add(n, columns, (x, Z, Vp), (x, A, Kp, 1), (x, S, Vp), K, (), (x, 0, 0))
        solve_earlier(columns, (x, Z, Vp), (x, M, CHUNK))
    if strong and form != DELTA:
        decay_rows(x, S, turned, dims, columns, g, token)
    if o.size > 0 and form == UNTIED:
        M += 2 * size
        read_earlier(n, columns, out, (x, Q, Kp, 1), (x, S, Vp), K, ((x, M, CHUNK, 1), value, n), (x, 0, 0))
        add_earlier(n, columns, out, (x, M + size, CHUNK, 1), (x, Z, Vp), n, (), (x, 0, 0))
    elif o.size > 0:
        M += 2 * size
        read_earlier(n, columns, out, (x, Q, Kp, 1), (x, S, Vp), K, ((x, M, CHUNK, 1), (x, Z, Vp), n), (x, 0, 0))
    write(x, W, S, dims, n, token, first, columns, v)
