"""One chunk of the delta kernels: which tokens it holds, its decayed rows, its triangular systems, its gradients.

A chunk is a run of at most C real tokens of one document, cut before the token that would take the decay since the
chunk's first token below exp(LIMIT) in any channel. Within it the products of decays can therefore be split into two
factors that neither overflow nor vanish, and with any gates the result stays exact: a chunk of one token has no
products to split. With P_m the decay from after token 1 up to and including token m (P_1 = 1) and w_1 that of token 1:

    rows that read S0      QAX = [scale q P w_1; a P_before w_1]        (a of the first token: undecayed)
    rows that read writes  QAP = [scale q P;     a P_before]
    what is written        KM = [k / P; b / P],  KE = KM P_C            (P_C: up to the end of the chunk)

Stacks hold C rows for q or k and C more for a or b; rows without a token are zero. The decays are products of
exponentials, not exponentials of sums, so their relative error does not grow with the decay. L is the number of rows
written: C, or 2 C when a's corrections have keys of their own (b).
"""

from __future__ import annotations

import numpy as np

from tidegate.ops.kernels import exp32, jit_views, wide_vectors
from tidegate.ops.matrix import clear, copy, matmul, matmul_into, transpose

C = 16
LIMIT = np.float32(-40.0)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)

# What belongs to a chunk in scratch (STACKS, 2 C, Kp). P's last row is w_1, the one before it the whole chunk's decay.
QAX, QAP, KM, KE, P, INVERSE = 0, 1, 2, 3, 4, 5
STACKS = 6
FIRST, WHOLE = 2 * C - 1, 2 * C - 2


@jit_views
def gather(x, tokens, n, batch, head, rows):
    """The tokens' rows of x (B, T, H, D) into `rows`."""
    for m in range(n):
        _scaled(ONE, x[batch, tokens[m], head], rows[m], x.shape[3])


@jit_views
def scatter(rows, tokens, n, batch, head, x):
    """`rows` into the tokens' rows of x (B, T, H, D)."""
    for m in range(n):
        _scaled(ONE, rows[m], x[batch, tokens[m], head], x.shape[3])


@jit_views
def next_chunk(codes, g, T, t, batch, head, tokens, total):
    """Collect the times of the chunk that begins at or after t. Its size (0: nothing but padding) and its end."""
    n, decays = 0, g.shape[3]
    has_codes = codes.shape[0] > 0
    while t < T and n < C:
        code = codes[batch, t] if has_codes else np.uint8(0)
        if code == 2:
            t += 1
            continue
        if code == 1 and n > 0:
            break
        if n == 0:
            for c in range(decays):
                total[c] = ZERO
        elif decays > 0:
            row = g[batch, t, head]
            for c in range(decays):
                total[c] += row[c]
            beyond = 0
            for c in range(decays):
                beyond += np.int32(total[c] < LIMIT)
            if beyond:
                break
        tokens[n] = t
        n += 1
        t += 1
    return n, t


@jit_views
def load_decays(g, tokens, n, batch, head, K, W):
    """P, its inverse, w_1 and the whole chunk's decay; they stay ones without decay."""
    wide_vectors()
    decays, products, inverses = g.shape[3], W[P], W[INVERSE]
    first = products[FIRST]
    if decays == 1:
        w = exp32(g[batch, tokens[0], head, 0])
        for c in range(K):
            first[c] = w
        w = ONE
        for m in range(1, n):
            w *= exp32(g[batch, tokens[m], head, 0])
            row, inverse, reciprocal = products[m], inverses[m], ONE / w
            for c in range(K):
                row[c] = w
            for c in range(K):
                inverse[c] = reciprocal
    elif decays > 1:
        logs = g[batch, tokens[0], head]
        for c in range(K):
            first[c] = exp32(logs[c])
        for m in range(1, n):
            row, before, inverse, logs = products[m], products[m - 1], inverses[m], g[batch, tokens[m], head]
            for c in range(K):
                row[c] = before[c] * exp32(logs[c])
            for c in range(K):
                inverse[c] = ONE / row[c]
    _multiply(products[n - 1], first, products[WHOLE], K)


@jit_views
def load_rows(q, k, a, b, beta, g, scale, tokens, n, batch, head, queries, W, KT):
    """Fill a chunk's stacks, and KT with KM transposed.

    Without a, a = -beta k w (the delta rule); without b, b = k.
    """
    K, delta, tied = q.shape[3], a.shape[0] == 0, b.shape[0] == 0
    load_decays(g, tokens, n, batch, head, K, W)
    far, near, middle, end, products, inverses = W[QAX], W[QAP], W[KM], W[KE], W[P], W[INVERSE]
    first, last = products[FIRST], products[n - 1]
    for m in range(n):
        t = tokens[m]
        key = k[batch, t, head]
        _written(key, inverses[m], last, middle[m], end[m], K)
        if not tied:
            _written(b[batch, t, head], inverses[m], last, middle[C + m], end[C + m], K)
        if delta:
            _read(key, products[m], first, -beta[batch, t, head], near[C + m], far[C + m], K)
        elif m > 0:
            _read(a[batch, t, head], products[m - 1], first, ONE, near[C + m], far[C + m], K)
        else:
            clear(near, C, C + 1)
            row, out = a[batch, t, head], far[C]
            for c in range(K):
                out[c] = row[c]
        if queries:
            _read(q[batch, t, head], products[m], first, scale, near[m], far[m], K)
    if n < C:
        for stack in (far, near, middle, end):
            clear(stack, n, C)
            clear(stack, C + n, 2 * C)
    transpose(middle, C if tied else 2 * C, middle.shape[1], KT)


@jit_views
def _written(x, inverse, last, middle, end, K):
    wide_vectors()
    for c in range(K):
        middle[c] = x[c] * inverse[c]
    for c in range(K):
        end[c] = middle[c] * last[c]


@jit_views
def _read(x, row, first, factor, near, far, K):
    wide_vectors()
    for c in range(K):
        near[c] = factor * x[c] * row[c]
    for c in range(K):
        far[c] = near[c] * first[c]


@jit_views
def load_values(v, beta, tokens, n, batch, head, delta, Z):
    """v, or beta v for the delta rule, into the first rows of Z; zeros where there is no token."""
    wide_vectors()
    V = v.shape[3]
    for m in range(n):
        row, value = Z[m], v[batch, tokens[m], head]
        factor = beta[batch, tokens[m], head] if delta else ONE
        for c in range(V):
            row[c] = factor * value[c]
    clear(Z, n, C)


@jit_views
def mask(M, n, L):
    """Rows of q see writes up to their own, rows of a only earlier ones."""
    wide_vectors()
    for begin in range(0, L, C):
        for m in range(n):
            row, below = M[m], M[C + m]
            for j in range(C):
                row[begin + j] = row[begin + j] if j <= m else ZERO
            for j in range(C):
                below[begin + j] = below[begin + j] if j < m else ZERO


@jit_views
def solve(M, column, Y, n):
    """Y <- (I - A)^-1 Y with A[m, j] = M[C + m, column + j], strictly lower triangular: four rows at a time."""
    flat, width, columns = M.reshape(M.size), M.shape[1], Y.shape[1]
    for begin in range(0, n, 4):
        corner = (C + begin) * width + column
        if begin > 0:
            matmul(flat[corner:], width, 1, Y, Y[begin:], 4, begin, columns)
        for m in range(1, 4):
            for j in range(m):
                add_row(flat[corner + m * width + begin + j], Y[begin + j], Y[begin + m], columns)


@jit_views
def solve_transposed(M, column, Y, n):
    """Y <- (I - A^T)^-1 Y, from the last rows to the first."""
    flat, width, columns = M.reshape(M.size), M.shape[1], Y.shape[1]
    rows = -(-n // 4) * 4
    for begin in range(rows - 4, -1, -4):
        after = begin + 4
        if after < rows:
            below = (C + after) * width + column + begin
            matmul(flat[below:], 1, width, Y[after:], Y[begin:], 4, rows - after, columns)
        corner = (C + begin) * width + column + begin
        for m in range(2, -1, -1):
            for j in range(m + 1, 4):
                add_row(flat[corner + j * width + m], Y[begin + j], Y[begin + m], columns)


@jit_views
def add_row(factor, x, y, columns):
    """y[:columns] += factor x[:columns]."""
    wide_vectors()
    for c in range(columns):
        y[c] += factor * x[c]


@jit_views
def solve_writes(M, X, Z, n, L):
    """From what a reads of S0 (X) to what the chunk writes: Z = [V + U] with shared keys, [V; U] with separate ones.

    U = X + A_ak V + A_ab U, with A_ak = A_ab if the keys are shared; V stands in Z's first rows.
    """
    columns = Z.shape[1]
    if L == C:
        for m in range(n):
            add_row(ONE, X[m], Z[m], columns)
        solve(M, 0, Z, n)
    else:
        U = Z[C:]
        copy(X, U, n, columns)
        clear(U, n, C)
        matmul(M[C:], M.shape[1], 1, Z, U, -(-n // 4) * 4, C, columns)
        solve(M, C, U, n)


@jit_views
def pull_back(M, E, dS, DOR, dZ, n, L):
    """Gradients of the chunk's writes, dZ, from its outputs' (first rows of DOR) and its end's (dS, with E the KE).

    Leaves the gradient of X in the last rows of DOR, and that of V in the first rows of dZ.
    """
    width, columns = M.shape[1], dZ.shape[1]
    matmul_into(E, E.shape[1], 1, dS, dZ, L, dS.shape[0], columns)
    matmul(M, 1, width, DOR, dZ, L, C, columns)
    dX = DOR[C:]
    copy(dZ[L - C :], dX, C, columns)
    solve_transposed(M, L - C, dX, n)
    if L == C:
        copy(dX, dZ, C, columns)
    else:
        matmul(M[C:], 1, width, dX, dZ, C, C, columns)


@jit_views
def store_decay_gradient(shared, W, dW, tokens, n, batch, head, delta, L, dg):
    """d log_decay. Every exponent of a chunk is a sum of log decays over a range of tokens; add up by ranges.

    shared: the gradient through S0's own way to the end, which all tokens have in common. dW holds the gradients of W's
    first four stacks; the other two are scratch.
    """
    K = shared.shape[0]
    # Summands of ranges: from the start to m; from inside to m; from m to the end (which reuses inverse's gradient).
    far, near, ahead = dW[P], dW[INVERSE], dW[INVERSE][C:]
    for m in range(n):
        x, y, z = far[m], near[m], ahead[m]
        _multiply(W[QAX, m], dW[QAX, m], x, K)
        _multiply(W[QAP, m], dW[QAP, m], y, K)
        _multiply(W[KE, m], dW[KE, m], z, K)
        _multiply_add(-ONE, W[KM, m], dW[KM, m], y, K)
        if L > C:
            _multiply_add(ONE, W[KE, C + m], dW[KE, C + m], z, K)
            _multiply_add(-ONE, W[KM, C + m], dW[KM, C + m], y, K)
        if delta:
            _multiply_add(ONE, W[QAX, C + m], dW[QAX, C + m], x, K)
            _multiply_add(ONE, W[QAP, C + m], dW[QAP, C + m], y, K)
        elif m > 0:  # a reads before its token's own decay
            _multiply_add(ONE, W[QAX, C + m], dW[QAX, C + m], far[m - 1], K)
            _multiply_add(ONE, W[QAP, C + m], dW[QAP, C + m], near[m - 1], K)
    # Token m counts in later rows of `far` and `near` and earlier ones of `ahead`; none inside begins before the first.
    for m in range(n - 2, -1, -1):
        add_row(ONE, far[m + 1], far[m], K)
    for m in range(n - 2, 0, -1):
        add_row(ONE, near[m + 1], near[m], K)
    for m in range(n):
        add_row(ONE, shared, far[m], K)
        if m > 0:
            add_row(ONE, near[m], far[m], K)
            add_row(ONE, ahead[m - 1], far[m], K)
            add_row(ONE, ahead[m - 1], ahead[m], K)
    for m in range(n):
        total, out = far[m], dg[batch, tokens[m], head]
        if out.shape[0] > 1:
            for c in range(K):
                out[c] = total[c]
        else:
            s = ZERO
            for c in range(K):
                s += total[c]
            out[0] = s


@jit_views
def _multiply(x, y, o, K):
    wide_vectors()
    for c in range(K):
        o[c] = x[c] * y[c]


@jit_views
def _multiply_add(sign, x, y, o, K):
    wide_vectors()
    for c in range(K):
        o[c] += sign * x[c] * y[c]


@jit_views
def store_gradients(k, v, beta, scale, tokens, n, batch, head, W, dW, dV, dq, dk, dv, da, db, dbeta):
    """From the gradients of a chunk's stacks to those of q, k, v, a, b and beta."""
    K, V = dq.shape[3], dv.shape[3]
    delta, tied = da.shape[0] == 0, db.shape[0] == 0
    products, inverses = W[P], W[INVERSE]
    first, last = products[FIRST], products[n - 1]
    for m in range(n):
        t = tokens[m]
        row, inverse, out = products[m], inverses[m], dk[batch, t, head]
        _back_read(dW[QAX, m], dW[QAP, m], row, first, scale, dq[batch, t, head], K)
        _back_written(dW[KM, m], dW[KE, m], inverse, last, out, K)
        if not tied:
            _back_written(dW[KM, C + m], dW[KE, C + m], inverse, last, db[batch, t, head], K)
        if delta:
            step = dW[QAP, C + m]  # becomes the gradient of -beta k
            _back_read(dW[QAX, C + m], step, row, first, ONE, step, K)
            factor = beta[batch, t, head]
            through_v = _dot(v[batch, t, head], dV[m], V)
            dbeta[batch, t, head] = through_v - _dot(k[batch, t, head], step, K)
            add_row(-factor, step, out, K)
            _scaled(factor, dV[m], dv[batch, t, head], V)
        else:
            if m == 0:
                _scaled(ONE, dW[QAX, C], da[batch, t, head], K)
            else:
                _back_read(dW[QAX, C + m], dW[QAP, C + m], products[m - 1], first, ONE, da[batch, t, head], K)
            _scaled(ONE, dV[m], dv[batch, t, head], V)


@jit_views
def _dot(x, y, K):
    wide_vectors()
    s = ZERO
    for c in range(K):
        s += x[c] * y[c]
    return s


@jit_views
def _scaled(factor, x, o, K):
    wide_vectors()
    for c in range(K):
        o[c] = factor * x[c]


@jit_views
def _back_read(far, near, row, first, factor, out, K):
    wide_vectors()
    for c in range(K):
        out[c] = factor * row[c] * (far[c] * first[c] + near[c])


@jit_views
def _back_written(middle, end, inverse, last, out, K):
    wide_vectors()
    for c in range(K):
        out[c] = inverse[c] * (middle[c] + end[c] * last[c])


@jit_views
def row_products(x, y, factors, o, rows, columns):
    """o[m] = factors[m] sum_c x[m, c] y[m, c]."""
    for m in range(rows):
        o[m] = factors[m] * _dot(x[m], y[m], columns)
