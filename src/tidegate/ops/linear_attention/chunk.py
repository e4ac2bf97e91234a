"""What the forward and backward kernels do with one chunk: find its end, its decays, its rows."""

from __future__ import annotations

import numpy as np

from tidegate.ops.kernels import copy_floats, exp32, exp_and_inverse, jit_views, wide_vectors

CHUNK = 16
STRONGEST = np.float32(-40.0)
ZERO = np.float32(0.0)


@jit_views
def plan(g, codes, b, h, begins, sizes, total):
    """Chunk boundaries of one problem: token index and length of each chunk. Padding belongs to none."""
    time, channels = g.shape[1], g.shape[3]
    chunks, t = 0, 0
    while t < time:
        if codes.shape[0] > 0 and codes[b, t] == 2:
            t += 1
            continue
        begins[chunks] = t
        for c in range(channels):
            total[c] = ZERO
        t += 1
        while t < time and t - begins[chunks] < CHUNK:
            if codes.shape[0] > 0 and codes[b, t] != 0:
                break
            row = g[b, t, h]
            strong = 0
            for c in range(channels):
                total[c] += row[c]
                strong += total[c] < STRONGEST
            if strong:
                break
            t += 1
        sizes[chunks] = t - begins[chunks]
        chunks += 1
    return chunks


@jit_views
def decays(g, b, h, begin, size, e, inverse, first):
    """e = exp(G), its inverse, and the first token's own decay, for one chunk; per key or broadcast from one."""
    wide_vectors()
    channels, keys = g.shape[3], e.shape[1]
    row = g[b, begin, h]
    if channels == 1:
        total = ZERO
        first[:] = exp32(row[0])
        for m in range(size):
            if m > 0:
                total += g[b, begin + m, h, 0]
            x = exp32(total)
            y = np.float32(1.0) / x
            em, im = e[m], inverse[m]
            for c in range(keys):
                em[c] = x
            for c in range(keys):
                im[c] = y
        return
    for c in range(channels):
        first[c] = exp32(row[c])
    e0 = e[0]
    for c in range(channels):
        e0[c] = ZERO
    for m in range(1, size):
        row, em, before = g[b, begin + m, h], e[m], e[m - 1]
        for c in range(channels):
            em[c] = before[c] + row[c]
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
