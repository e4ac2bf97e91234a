"""The two sweeps of the backward pass over one problem: forward for the queries, reverse for everything else.

The gradients of q, k and the decay need the states' columns of keys only (kept transposed), that of v the columns of
values: a sweep can be told to do some of them (keys first to until, values first_v to until_v), which changes no bit.
"""

from __future__ import annotations

import numpy as np

from tidegate.ops.chunks import (
    CHUNK,
    clear,
    cumulate_logs,
    dot,
    exp_and_inverse,
    exp_of,
    fill_ones,
    multiply,
    next_chunk,
)
from tidegate.ops.kernels import LANES, jit_inside
from tidegate.ops.linear_attention.chunk import (
    accumulate,
    all_,
    all_of_logs,
    keys,
    keys_of_logs,
    read_earlier_scaled,
    read_later,
    read_later_scaled,
    scores,
    sum_of_differences,
    write_columns,
    write_rows,
)
from tidegate.ops.passes import prefetch
from tidegate.ops.tiles import transpose


@jit_inside
def places(T, K, V):
    """Where things stand in scratch after four stacks of rows: turned, ..., saved; and its size."""
    Kp, Vp = -(-K // LANES) * LANES, -(-V // LANES) * LANES
    turned = 4 * CHUNK * Kp + Kp
    pairs = turned + max(Kp, Vp) * CHUNK
    first = pairs + CHUNK * CHUNK
    total = first + max(Kp, CHUNK)  # also one per token
    states = total + Kp
    ends = states + 2 * Kp * Vp
    saved = ends + (T + 1) * Kp
    return turned, pairs, first, total, states, ends, saved, saved + T * CHUNK


@jit_inside
def gradient_of_queries(x, chunks, dims, b, h, first_key, until_key, k, v, g, codes, state, scale, do, dq):
    """Forward: the states again, transposed so that rows run over keys. Notes the chunks and returns how many.

    A chunk's decay goes to `ends`, after a row of ones, and tril(do v^T) to `saved`, both for the second sweep.
    """
    T, H, K, V, G = dims
    Kp = -(-K // LANES) * LANES
    turned, _, first, _, S, ends, saved, _ = places(T, K, V)
    logs, row = 0, Kp if G > 1 else 1
    ks, es = CHUNK * Kp + Kp, 2 * CHUNK * Kp + Kp
    some = until_key - first_key
    transpose(K, V, (x, S, Kp), (state, (b * H + h) * K * V, V))
    fill_ones(1, K, ((x, ends, 0),), ())
    t = count = 0
    while t < T:
        code = codes[b * T + t] if codes.size > 0 else 0
        if code == 2:
            t += 1
            continue
        token = (b * T + t) * H + h
        ahead = token + 2 * CHUNK * H
        prefetch(CHUNK, K, (k, ahead * K, H * K))
        prefetch(CHUNK, V, (v, ahead * V, H * V))
        prefetch(CHUNK, V, (do, ahead * V, H * V))
        prefetch(CHUNK, some, (dq, ahead * K + first_key, H * K))
        prefetch(CHUNK, G, (g, ahead * G, H * G))
        size, strong = next_chunk(x, logs, row, g, codes, b * T + t, token * G, H * G, G, T - t)
        chunks[0, count], chunks[1, count] = t, -size if strong else size
        count += 1
        end = ends + count * Kp
        exp_of(x, end, K, x, logs + (size - 1) * row, G)
        if some > 0:
            if code == 1:
                clear(V, some, ((x, S + first_key, Kp),), ())
            elif strong:
                exp_of(x, first, K, g, token * G, G)
                multiply(V, some, ((x, S + first_key, Kp),), ((x, S + first_key, Kp), (x, first + first_key, 0)))
            outputs = (x, ks + first_key, Kp), (x, es + first_key, Kp)
            key = (k, token * K + first_key, H * K)
            if G > 1:
                keys_of_logs(size, some, outputs, ((x, logs + first_key, Kp), key, scale))
            else:
                exp_and_inverse(1, size, ((x, logs, 0), (x, logs + CHUNK, 0)), ((x, logs, 0),))
                keys(size, some, outputs, ((x, logs), (x, logs + CHUNK), key, scale))
            pairs, value = saved + t * CHUNK, (v, token * V, H * V)
            transpose(size, V, (x, turned, CHUNK), value)
            upstream = (do, token * V, H * V, 1)
            scores(size, CHUNK, (x, pairs, CHUNK), upstream, (x, turned, CHUNK), V, (), (x, 0, 0))
            read_earlier_scaled(
                *(size, some, (dq, token * K + first_key, H * K), upstream, (x, S + first_key, Kp), V),
                *(((x, pairs, CHUNK, 1), (x, ks + first_key, Kp), size), (x, es + first_key, Kp)),
            )
            write_columns(
                *(V, some, (x, S + first_key, Kp), (v, token * V, 1, H * V), (x, ks + first_key, Kp), size, ()),
                (x, end + first_key, 0),
            )
        t += size
    return count


@jit_inside
def other_gradients(
    x, chunks, dims, b, h, count, first_key, until_key, first_value, until_value,
    q, k, v, g, codes, last, scale, do, dlast, dq, dk, dv, dg, dstate,
):  # fmt: skip
    """Reverse: the gradient R of the state, and R transposed, for dk, dv and the decay.

    Before a chunk R is multiplied by that chunk's decay, which its reads of the state's end have in common.
    """
    T, H, K, V, G = dims
    Kp, Vp = -(-K // LANES) * LANES, -(-V // LANES) * LANES
    turned, pairs, first, total, states, ends, saved, _ = places(T, K, V)
    logs, row = 0, Kp if G > 1 else 1
    qs, ks, inverse = CHUNK * Kp + Kp, 2 * CHUNK * Kp + Kp, 3 * CHUNK * Kp + Kp
    R_T, R = states + first_key, states + Kp * Vp + first_value
    some, values = until_key - first_key, until_value - first_value
    blocks = -(-K // LANES)
    channels = K if G > 1 else blocks  # of dg
    at, end = (b * H + h) * K * V, ends + count * Kp
    transpose(K, V, (x, states, Kp), (dlast, at, V))
    multiply(V, some, ((x, R_T, Kp),), ((x, R_T, Kp), (x, end + first_key, 0)))
    multiply(K, values, ((x, R, Vp),), ((dlast, at + first_value, V), (x, end)))
    dot(K, V, ((x, total),), ((dlast, at, V), (last, at, V)))
    if G == 1:  # one sum for every vector of keys, wherever the keys are split
        for block in range(blocks):
            sum_ = np.float32(0.0)
            for c in range(block * LANES, min(K, (block + 1) * LANES)):
                sum_ += x[total + c]
            x[total + block] = sum_
    for chunk in range(count - 1, -1, -1):
        t, size = np.int64(chunks[0, chunk]), np.int64(abs(chunks[1, chunk]))
        strong = chunks[1, chunk] < 0
        token, end = (b * T + t) * H + h, ends + chunk * Kp
        ahead = max(b * T + t - 2 * CHUNK, 0) * H + h
        for row_ in (q, k, dq, dk):
            prefetch(CHUNK, K, (row_, ahead * K, H * K))
        for row_ in (v, do, dv):
            prefetch(CHUNK, V, (row_, ahead * V, H * V))
        prefetch(CHUNK, G, (g, ahead * G, H * G))
        prefetch(CHUNK, channels, (dg, ahead * channels, H * channels))
        cumulate_logs(x, logs, row, g, token * G, H * G, G, size, strong)
        outputs = (x, qs, Kp), (x, ks, Kp), (x, inverse, Kp)
        query, key = (q, token * K, H * K), (k, token * K, H * K)
        if G > 1:
            all_of_logs(size, K, outputs, ((x, logs, Kp), query, key, scale))
        else:
            exp_and_inverse(1, size, ((x, logs, 0), (x, logs + CHUNK, 0)), ((x, logs, 0),))
            all_(size, K, outputs, ((x, logs), (x, logs + CHUNK), query, key, scale))
        if values > 0:  # dv = (k e^-G) R + A^T do
            upstream = (do, token * V + first_value, H * V)
            transpose(size, K, (x, turned, CHUNK), (x, ks, Kp))
            scores(size, CHUNK, (x, pairs, CHUNK), (x, qs, Kp, 1), (x, turned, CHUNK), K, (), (x, 0, 0))
            read_later(
                *(size, values, (dv, token * V + first_value, H * V), (x, ks, Kp, 1), (x, R, Vp), K),
                *(((x, pairs, 1, CHUNK), upstream, size), (x, 0, 0)),
            )
            write_rows(K, values, (x, R, Vp), (x, qs, 1, Kp), upstream, size, (), (x, end, 0))
        if some > 0:  # dk = e^-G (v R^T + P^T (q e^G))
            read_later_scaled(
                *(size, some, (dk, token * K + first_key, H * K), (v, token * V, H * V, 1), (x, R_T, Kp), V),
                ((x, saved + t * CHUNK, 1, CHUNK), (x, qs + first_key, Kp), size),
                (x, inverse + first_key, Kp),
            )
            write_columns(
                *(V, some, (x, R_T, Kp), (do, token * V, 1, H * V), (x, qs + first_key, Kp), size, ()),
                (x, end + first_key, 0),
            )
            # dg = reverse cumulative sum of q dq - k dk
            back, final = -H * K, (token + (size - 1) * H) * K + first_key
            if G > 1:
                accumulate(
                    *(size, some, ((x, total + first_key, 0), (dg, final, back))),
                    ((q, final, back), (dq, final, back), (k, final, back), (dk, final, back)),
                )
            else:
                for block in range(first_key // LANES, -(-until_key // LANES)):
                    begin = token * K + block * LANES
                    here = (q, begin, H * K), (dq, begin, H * K), (k, begin, H * K), (dk, begin, H * K)
                    sum_of_differences(size, min(LANES, K - block * LANES), ((x, first),), here)
                    sum_ = x[total + block]
                    for m in range(size - 1, -1, -1):
                        sum_ += x[first + m]
                        dg[(token + m * H) * blocks + block] = sum_
                    x[total + block] = sum_
        if codes.size > 0 and codes[b * T + t] == 1:  # nothing came before: the first decay acted on zeros
            clear(K, values, ((x, R, Vp),), ())
            clear(V, some, ((x, R_T, Kp),), ())
            if some > 0 and G > 1:
                clear(1, some, ((x, total + first_key, 0),), ())
                clear(1, some, ((dg, token * K + first_key, 0),), ())
            elif some > 0:
                begin, number = first_key // LANES, -(-until_key // LANES) - first_key // LANES
                clear(1, number, ((x, total + begin, 0),), ())
                clear(1, number, ((dg, token * blocks + begin, 0),), ())
        elif strong:
            exp_of(x, first, K, g, token * G, G)
            multiply(K, values, ((x, R, Vp),), ((x, R, Vp), (x, first)))
            multiply(V, some, ((x, R_T, Kp),), ((x, R_T, Kp), (x, first + first_key, 0)))
    multiply(K, values, ((dstate, at + first_value, V),), ((x, R, Vp), np.float32(1.0)))
