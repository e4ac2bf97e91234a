"""What a channel's matrix is needed for, made by doubling, and the way back of the gradients.

From a (N, N), b and c, for pieces of Q = 2^levels tokens: the powers of a, what a token has become by its age, a^l b,
and what is read of a state from l + 1 tokens ago, c a^(l+1). Powers are kept transposed, because a state is a row here:

    W[j] = (a^T)^(2^j)      X[l] = b (a^T)^l      E[l] = c a^(l+1)      K[0] = c b,  K[l] = b E[l-1]

All matrices are in one scratch array, with rows that are whole vectors.
"""

from __future__ import annotations

from tidegate.ops.chunks import clear
from tidegate.ops.kernels import LANES, copy_floats, jit_inside, jit_views
from tidegate.ops.tiles import product, transpose

times, add_times = product(), product(start="add")

HEAD_LEVELS = 4
HEAD = 1 << HEAD_LEVELS


@jit_views
def places(N, M, Q, levels, P):
    """Row lengths of N and Q numbers; where, after W, X, E (turned), K and the pieces' first states stand; the end."""
    Np, Qp = -(-N // LANES) * LANES, -(-Q // LANES) * LANES
    X = (levels + 1) * Np * Np
    E = X + Qp * Np
    K = E + M * Np * Qp
    H = K + M * 2 * Qp
    return Np, Qp, X, E, K, H, H + (P + HEAD) * Np


@jit_inside
def make_tables(x, d, dims, a, b, c):
    """Of channel d; K stands behind Qp zeros, so that K[t - s] is a matrix, zero above its diagonal."""
    N, M, Q, levels, P = dims
    Np, Qp, X, E, K, H, _ = places(N, M, Q, levels, P)
    size, none = Np * Np, (x, 0, 0)
    transpose(N, N, (x, 0, Np), (a, d * N * N, N))
    for j in range(levels):
        W = j * size
        times(N, N, (x, W + size, Np), (x, W, Np, 1), (x, W, Np), N, (), none)
    copy_floats(b, d * N, x, X, N)
    clear(M, 2 * Qp, ((x, K, 2 * Qp),), ())
    count, W, head = 1, 0, min(Q, HEAD)
    while count < Q:
        times(count, N, (x, X + count * Np, Np), (x, X, Np, 1), (x, W, Np), N, (), none)
        count, W = 2 * count, W + size
    for m in range(M):
        e, k, row = E + m * Np * Qp, K + (2 * m + 1) * Qp, (d * M + m) * N
        # The first few one by one, as rows, then by doubling, as columns: vectors are filled either way.
        times(1, N, (x, H, Np), (c, row, 0, 1), (a, d * N * N, N), N, (), none)
        for s in range(1, head):
            times(1, N, (x, H + s * Np, Np), (x, H + (s - 1) * Np, 0, 1), (a, d * N * N, N), N, (), none)
        transpose(head, N, (x, e, Qp), (x, H, Np))
        count, W = head, HEAD_LEVELS * size
        while count < Q:
            times(N, count, (x, e + count, Qp), (x, W, Np, 1), (x, e, Qp), N, (), none)
            count, W = 2 * count, W + size
        times(1, 1, (x, k, 1), (b, d * N, 0, 1), (c, row, 1), N, (), none)
        times(1, Q - 1, (x, k + 1, 1), (b, d * N, 0, 1), (x, e, Qp), N, (), none)


@jit_views
def gradient_places(N, M, Q, levels, P):
    """Behind those of `places`: a turned matrix, X (turned, latest first), E and K reversed, gradients of W, X, E and K
    (reversed), of the states before and after the pieces, a matrix Q x Q, a few rows; the end."""
    Np, Qp, _, _, _, _, turned = places(N, M, Q, levels, P)
    XT = turned + Np * Np
    E = XT + Np * Qp
    KR = E + M * Qp * Np
    dW = KR + M * 2 * Qp
    dX = dW + (levels + 1) * Np * Np
    dE = dX + Qp * Np
    dK = dE + M * Qp * Np
    G = dK + M * Qp
    after = G + (P + 1) * Np
    pairs = after + (P + 1) * Np
    rows = pairs + Qp * Qp
    return turned, XT, E, KR, dW, dX, dE, dK, G, after, pairs, rows, rows + (levels + 3) * Np


@jit_inside
def turn_tables(x, dims):
    """X and E turned, and K reversed with zeros behind."""
    N, M, Q, levels, P = dims
    Np, Qp, X, E, K, _, _ = places(N, M, Q, levels, P)
    _, XT, E_rows, KR, _, _, _, _, _, _, _, _, _ = gradient_places(N, M, Q, levels, P)
    transpose(Q, N, (x, XT, Qp), (x, X + (Q - 1) * Np, -Np))
    clear(M, 2 * Qp, ((x, KR, 2 * Qp),), ())
    for m in range(M):
        transpose(N, Q, (x, E_rows + m * Qp * Np, Np), (x, E + m * Np * Qp, Qp))
        for s in range(Q):
            x[KR + 2 * m * Qp + s] = x[K + (2 * m + 1) * Qp + Q - 1 - s]


@jit_inside
def gradients_of_tables(x, d, dims, a, b, c, da, db, dc):
    """From those of W, X, E and K to those of a, b and c, which are written (db and dc: added to)."""
    N, M, Q, levels, P = dims
    Np, Qp, X, _, _, _, _ = places(N, M, Q, levels, P)
    turned, _, E, _, dW, dX, dE, dK, _, _, _, _, _ = gradient_places(N, M, Q, levels, P)
    size, none = Np * Np, (x, 0, 0)
    for m in range(M):
        e, de, last, row = E + m * Qp * Np, dE + m * Qp * Np, dK + m * Qp + Q - 1, (d * M + m) * N
        add_times(1, N, (db, d * N, N), (x, last, 0, 1), (c, row, N), 1, (), none)
        add_times(1, N, (dc, row, N), (x, last, 0, 1), (b, d * N, N), 1, (), none)
        add_times(Q - 1, N, (x, de, Np), (x, last - 1, -1, 0), (b, d * N, 0), 1, (), none)
        add_times(1, N, (db, d * N, N), (x, last - 1, 0, -1), (x, e, Np), Q - 1, (), none)
    count = Q // 2
    for j in range(levels - 1, -1, -1):
        W, dw, later = j * size, dW + j * size, count * Np
        transpose(N, N, (x, turned, Np), (x, W, Np))
        add_times(N, N, (x, dw, Np), (x, dw + size, Np, 1), (x, turned, Np), N, (), none)
        add_times(N, N, (x, dw, Np), (x, turned, Np, 1), (x, dw + size, Np), N, (), none)
        add_times(N, N, (x, dw, Np), (x, X, 1, Np), (x, dX + later, Np), count, (), none)
        add_times(count, N, (x, dX, Np), (x, dX + later, Np, 1), (x, turned, Np), N, (), none)
        if count >= HEAD:
            for m in range(M):
                e, de = E + m * Qp * Np, dE + m * Qp * Np
                add_times(N, N, (x, dw, Np), (x, de + later, 1, Np), (x, e, Np), count, (), none)
                add_times(count, N, (x, de, Np), (x, de + later, Np, 1), (x, W, Np), N, (), none)
        count //= 2
    for n in range(N):
        db[d * N + n] += x[dX + n]
    for m in range(M):
        e, de, row = E + m * Qp * Np, dE + m * Qp * Np, (d * M + m) * N
        for s in range(min(Q, HEAD) - 1, 0, -1):
            add_times(1, N, (x, de + (s - 1) * Np, Np), (x, de + s * Np, 0, 1), (x, 0, Np), N, (), none)
        add_times(N, N, (x, dW, Np), (x, de + Np, 1, Np), (x, e, Np), min(Q, HEAD) - 1, (), none)
        add_times(N, N, (x, dW, Np), (x, de, 1, 0), (c, row, 0), 1, (), none)
        add_times(1, N, (dc, row, N), (x, de, 0, 1), (x, 0, Np), N, (), none)
    transpose(N, N, (x, turned, Np), (x, dW, Np))
    for n in range(N):
        copy_floats(x, turned + n * Np, da, (d * N + n) * N, N)
