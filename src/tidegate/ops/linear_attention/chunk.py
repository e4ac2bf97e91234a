"""What the forward and backward kernels do with one chunk: find its end, its decays, its rows."""

from __future__ import annotations

import numpy as np

from tidegate.ops.kernels import copy_floats, exp32, exp_and_inverse, jit_views, prefetch, wide_vectors

CHUNK = 16
STRONGEST = np.float32(-40.0)
ZERO = np.float32(0.0)


@jit_views
def cumulate(g, b, h, t, size, logs):
    """`logs` gets the cumulative log decay of a chunk's tokens, from 0 at the first one."""
    channels = g.shape[3]
    now = logs[0]
    for c in range(channels):
        now[c] = ZERO
    for m in range(1, size):
        before, now, row = logs[m - 1], logs[m], g[b, t + m, h]
        for c in range(channels):
            now[c] = before[c] + row[c]


@jit_views
def next_chunk(g, codes, b, h, t, logs):
    """Tokens in the chunk that begins at t; `logs` gets their cumulative log decay."""
    time, channels = g.shape[1], g.shape[3]
    prefetch(g, b, t + 2 * CHUNK, t + 3 * CHUNK, h)
    size = min(time - t, CHUNK)
    if codes.shape[0] > 0:
        for m in range(1, size):
            if codes[b, t + m] != 0:
                size = m
                break
    cumulate(g, b, h, t, size, logs)
    while size > 1:  # decays only add up, so the last row is the strongest: mostly one look is enough
        last, strong = logs[size - 1], 0
        for c in range(channels):
            strong += last[c] < STRONGEST
        if strong == 0:
            break
        size -= 1
    return size


@jit_views
def decays(g, b, h, t, size, e, inverse, first):
    """e = exp(G) from G, its inverse, and the first token's own decay; per key channel or broadcast from one."""
    wide_vectors()
    channels, keys = g.shape[3], e.shape[1]
    row = g[b, t, h]
    if channels == 1:
        x = exp32(row[0])
        for c in range(keys):
            first[c] = x
        for m in range(size):
            em, im = e[m], inverse[m]
            x, y = exp_and_inverse(em[0])
            for c in range(keys):
                em[c] = x
            for c in range(keys):
                im[c] = y
        return
    for c in range(channels):
        first[c] = exp32(row[c])
    flat, flat_inverse = e.reshape(-1), inverse.reshape(-1)
    for i in range(size * keys):
        flat[i], flat_inverse[i] = exp_and_inverse(flat[i])


@jit_views
def load(x, b, h, begin, size, out):
    """Rows of one chunk and head into scratch."""
    time, heads, width = x.shape[1], x.shape[2], x.shape[3]
    for m in range(size):
        copy_floats(x, ((b * time + begin + m) * heads + h) * width, out, m * out.shape[1], width)


@jit_views
def store(out, b, h, begin, size, x):
    """Rows of scratch back to their chunk and head."""
    time, heads, width = x.shape[1], x.shape[2], x.shape[3]
    for m in range(size):
        copy_floats(out, m * out.shape[1], x, ((b * time + begin + m) * heads + h) * width, width)


@jit_views
def multiply(x, factor, scale, size):
    """x *= factor * scale on the first rows of scratch. In place: two views of one array would not vectorise."""
    wide_vectors()
    a, f = x.reshape(-1), factor.reshape(-1)
    for i in range(size * x.shape[1]):
        a[i] *= f[i] * scale


@jit_views
def multiply_columns(x, factors, size):
    """x *= factors, one factor per column."""
    wide_vectors()
    for m in range(size):
        row = x[m]
        for c in range(x.shape[1]):
            row[c] *= factors[c]


@jit_views
def keep_lower(x, size):
    """Zero above the diagonal."""
    for m in range(size):
        for n in range(m + 1, size):
            x[m, n] = ZERO
