"""The two sweeps of the backward pass over one problem: forward for the queries, reverse for everything else."""

from __future__ import annotations

import numpy as np

from tidegate.ops.kernels import copy_floats, jit_views, prefetch, wide_vectors
from tidegate.ops.linear_attention.chunk import (
    CHUNK,
    ZERO,
    cumulate,
    decays,
    keep_lower,
    load,
    multiply,
    multiply_columns,
    next_chunk,
    store,
)
from tidegate.ops.matrix import clear, matmul_columns, matmul_into, matmul_lower, matmul_rows, matmul_upper, transpose


@jit_views
def gradient_of_queries(b, h, k, v, g, codes, state, scale, do, dq, scratch):
    """Forward: the states again, transposed so that rows run over keys. Notes the chunks and returns how many."""
    wide_vectors()
    chunks, saved, rows, vectors, columns, scores, values_, S_T, R = scratch
    time, heads, keys, values = k.shape[1], k.shape[2], k.shape[3], v.shape[3]
    K, V = R.shape
    one = np.float32(1.0)
    begins, sizes = chunks[0], chunks[1]
    e, inverse, ks, grad = rows[0], rows[1], rows[2], rows[3]
    vs, dos, v_columns = values_[0], values_[1], columns[0]
    first, factor = vectors[0], vectors[1]
    at = (b * heads + h) * keys * values
    for j in range(keys):
        copy_floats(state, at + j * values, R, j * V, values)
    transpose(R, K, V, S_T)
    for j in range(K):
        factor[j] = one
    t = count = 0
    while t < time:
        if codes.shape[0] > 0 and codes[b, t] == 2:
            t += 1
            continue
        size = next_chunk(g, codes, b, h, t, e)
        begins[count], sizes[count] = t, size
        count += 1
        tall = -(-size // 4) * 4
        ahead, beyond = t + 2 * CHUNK, t + 3 * CHUNK
        prefetch(k, b, ahead, beyond, h)
        prefetch(v, b, ahead, beyond, h)
        prefetch(do, b, ahead, beyond, h)
        prefetch(dq, b, ahead, beyond, h)
        decays(g, b, h, t, size, e, inverse, first)
        load(k, b, h, t, size, ks)
        multiply(ks, inverse, one, size)
        load(v, b, h, t, size, vs)
        load(do, b, h, t, size, dos)
        starts = codes.shape[0] > 0 and codes[b, t] == 1
        for j in range(K):
            factor[j] *= first[j]
        if starts:
            clear(S_T, 0, V)
        transpose(vs, CHUNK, V, v_columns)
        matmul_into(dos, V, 1, v_columns, scores, tall, values, CHUNK)
        keep_lower(scores, size)
        copy_floats(scores, 0, saved, t * CHUNK, size * CHUNK)
        matmul_into(dos, V, 1, S_T, grad, tall, values, K)
        multiply_columns(grad, factor, size)
        matmul_lower(scores, CHUNK, 1, ks, grad, tall, size, K)
        matmul_columns(vs, 1, V, ks, S_T, V, size, K, factor)
        copy_floats(e, (size - 1) * K, factor, 0, K)
        multiply(grad, e, scale, size)
        store(grad, b, h, t, size, dq)
        t += size
    return count


@jit_views
def other_gradients(b, h, count, q, k, v, g, codes, last, scale, do, dlast, dq, dk, dv, dg, dstate, scratch):
    """Reverse: the gradient R of the state, both ways round, for dk, dv and the decay. R lags as S did."""
    wide_vectors()
    chunks, saved, rows, vectors, columns, scores, values_, R_T, R = scratch
    heads, keys, values = q.shape[2], q.shape[3], v.shape[3]
    channels = g.shape[3]
    K, V = R.shape
    one = np.float32(1.0)
    begins, sizes = chunks[0], chunks[1]
    e, inverse, qs, ks, q_rows, k_rows, reads, grad = (
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7],
    )  # fmt: skip
    vs, dos, dvs, k_columns = values_[0], values_[1], values_[2], columns[0]
    first, factor, total = vectors[0], vectors[1], vectors[2]
    at = (b * heads + h) * keys * values
    for j in range(K):
        total[j] = ZERO
    for j in range(keys):
        gradient, final = dlast[b, h, j], last[b, h, j]
        sum_ = ZERO
        for c in range(values):
            sum_ += gradient[c] * final[c]
        total[j] = sum_
        copy_floats(dlast, at + j * values, R, j * V, values)
    transpose(R, K, V, R_T)
    for j in range(K):
        factor[j] = one
    for chunk in range(count - 1, -1, -1):
        t, size = begins[chunk], sizes[chunk]
        tall = -(-size // 4) * 4
        ahead, beyond = max(0, t - 2 * CHUNK), t - CHUNK
        prefetch(q, b, ahead, beyond, h)
        prefetch(k, b, ahead, beyond, h)
        prefetch(v, b, ahead, beyond, h)
        prefetch(do, b, ahead, beyond, h)
        prefetch(dq, b, ahead, beyond, h)
        prefetch(g, b, ahead, beyond, h)
        prefetch(dk, b, ahead, beyond, h)
        prefetch(dv, b, ahead, beyond, h)
        prefetch(dg, b, ahead, beyond, h)
        cumulate(g, b, h, t, size, e)
        decays(g, b, h, t, size, e, inverse, first)
        load(q, b, h, t, size, q_rows)
        copy_floats(q_rows, 0, qs, 0, size * K)
        multiply(qs, e, scale, size)
        load(k, b, h, t, size, k_rows)
        copy_floats(k_rows, 0, ks, 0, size * K)
        multiply(ks, inverse, one, size)
        load(v, b, h, t, size, vs)
        load(do, b, h, t, size, dos)
        closing = e[size - 1]
        for j in range(K):
            factor[j] *= closing[j]
        # dv = (k e^-G) R + A^T do
        transpose(ks, CHUNK, K, k_columns)
        matmul_into(qs, K, 1, k_columns, scores, tall, keys, CHUNK)
        keep_lower(scores, size)
        copy_floats(ks, 0, reads, 0, size * K)
        multiply_columns(reads, factor, size)
        matmul_into(reads, K, 1, R, dvs, tall, keys, V)
        matmul_upper(scores, 1, CHUNK, dos, dvs, tall, size, V)
        store(dvs, b, h, t, size, dv)
        # dk = e^-G (v R^T + P^T (q e^G))
        copy_floats(saved, t * CHUNK, scores, 0, size * CHUNK)
        matmul_into(vs, V, 1, R_T, grad, tall, values, K)
        multiply_columns(grad, factor, size)
        matmul_upper(scores, 1, CHUNK, qs, grad, tall, size, K)
        multiply(grad, inverse, one, size)
        store(grad, b, h, t, size, dk)
        # R before the chunk, but for its first token's decay
        matmul_rows(qs, 1, K, dos, R, K, size, V, factor)
        matmul_columns(dos, 1, V, qs, R_T, V, size, K, factor)
        # dg = reverse cumulative sum of q dq - k dk
        load(dq, b, h, t, size, reads)
        multiply(q_rows, reads, one, size)
        multiply(k_rows, grad, one, size)
        for m in range(size - 1, -1, -1):
            now, from_k = q_rows[m], k_rows[m]
            for j in range(K):
                total[j] += now[j] - from_k[j]
            copy_floats(total, 0, q_rows, m * K, K)
            if channels == 1:
                sum_ = ZERO
                for j in range(keys):
                    sum_ += now[j]
                dg[b, t + m, h, 0] = sum_
        if channels > 1:
            store(q_rows, b, h, t, size, dg)
        copy_floats(first, 0, factor, 0, K)
        if codes.shape[0] > 0 and codes[b, t] == 1:  # nothing came before: the first token's decay acted on zeros
            for j in range(channels):
                dg[b, t, h, j] = ZERO
            for j in range(K):
                total[j] = ZERO
            clear(R, 0, K)
            clear(R_T, 0, V)
    for j in range(keys):
        row, f = R[j], factor[j]
        for c in range(values):
            row[c] *= f
        copy_floats(R, j * V, dstate, at + j * values, values)
