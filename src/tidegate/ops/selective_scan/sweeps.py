"""Selective scan, one window of time and one group of channels: the two sweeps of the kernels.

A window is CHUNK positions; its real tokens are numbered from 0, and a run is a stretch of them without a document's
start inside. A group is LANES neighbouring channels, one in each lane of a vector. For two states at a time the whole
window is walked, so that what is carried from token to token stays in registers. `s` holds, for each group, a row of
CHUNK vectors of each of the quantities named below; `bc` the tokens' b, then c, with an even number of states.
"""

from __future__ import annotations

import numpy as np

from tidegate.ops.kernels import LANES, copy_floats, jit_views, prefetch_line, wide_vectors
from tidegate.ops.vector import exp2, fill, load, load_some, sigmoid, softplus, splat, store, store_some, total

CHUNK = 32
ROW = (CHUNK + 1) * LANES  # one vector more, so that the rows' beginnings do not compete for the same cache lines
STEP, U, Y, X, SLOPE, DY, DU, DSTEP = (ROW * row for row in range(8))
GROUP = ROW * 8
SPAN = 4  # groups whose rows are in scratch at a time: they fit the first-level cache
DECAY, KEPT = SPAN * GROUP, SPAN * GROUP + 2 * ROW  # for two states of the group at hand
SCRATCH = SPAN * GROUP + 4 * ROW
LOG2E, LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
ZERO, ONE = np.float32(0.0), np.float32(1.0)


@jit_views
def next_window(codes, batch, begin, end, tokens, ends, fresh):
    """The real tokens from `begin` to `end`, and where runs end and which begin a document. How many of both."""
    n, runs = 0, 0
    masked = codes.shape[0] > 0
    for t in range(begin, end):
        code = codes[batch, t] if masked else np.uint8(0)
        if code == 2:
            continue
        if n == 0 or code == 1:
            fresh[runs] = code
            runs += 1
        tokens[n] = t
        n += 1
        ends[runs - 1] = n
    return n, runs


@jit_views
def prefetch(x, batch, begin, part, low, high):
    """Ask for one of SPAN parts of what comes next: from token `begin` on, SPAN groups from `low` on, of x (B, T, D).

    Rows lie too far apart for the machine to foresee them, and all of a window at once would have to be waited for.
    """
    time, dim = x.shape[1], x.shape[2]
    if begin >= 0 and time > 0:
        for t in range(begin + part * CHUNK // SPAN, min(begin + (part + 1) * CHUNK // SPAN, time)):
            for channel in range(low, min(low + SPAN * LANES, high), 16):  # a cache line
                prefetch_line(x, (batch * time + t) * dim + channel)


@jit_views
def load_states(x, row, low, high, into, factor):
    """x[row] (N, D) times `factor` into one vector per group and state; one state more if their number is odd."""
    wide_vectors()
    states, dim = x.shape[1], x.shape[2]
    at = 0
    for channel in range(low, high, LANES):
        for n in range(states):
            values = load_some(x, (row * states + n) * dim + channel, high - channel)
            store(into, at, values * fill(factor))
            at += LANES
        if states % 2:
            store(into, at, fill(ZERO))
            at += LANES


@jit_views
def store_states(x, row, low, high, source):
    wide_vectors()
    states, dim = x.shape[1], x.shape[2]
    at = 0
    for channel in range(low, high, LANES):
        for n in range(states):
            store_some(x, (row * states + n) * dim + channel, load(source, at), high - channel)
            at += LANES
        at += states % 2 * LANES


@jit_views
def load_tokens(b, c, batch, tokens, n, bc):
    time, states = b.shape[1], b.shape[2]
    pairs = states + states % 2
    for i in range(n):
        at = (batch * time + tokens[i]) * states
        copy_floats(b, at, bc, 2 * i * pairs, states)
        copy_floats(c, at, bc, (2 * i + 1) * pairs, states)


@jit_views
def load_channels(x, dt, d, bias, batch, low, high, tokens, n, s):
    """STEP, SLOPE (its derivative by dt), X, U, and the skip connection in Y."""
    wide_vectors()
    time, dim = x.shape[1], x.shape[2]
    for i in range(n):
        row = i * LANES
        for channel in range(low, high, LANES):
            at, count = (batch * time + tokens[i]) * dim + channel, high - channel
            step, x_t = load_some(dt, at, count), load_some(x, at, count)
            if bias.shape[0] > 0:
                step = step + load_some(bias, channel, count)
                store(s, SLOPE + row, sigmoid(step))
                step = softplus(step)
            store(s, STEP + row, step)
            store(s, X + row, x_t)
            store(s, U + row, step * x_t)
            store(s, Y + row, load_some(d, channel, count) * x_t)
            row += GROUP


@jit_views
def store_outputs(z, batch, low, high, tokens, n, s, y):
    wide_vectors()
    time, dim = y.shape[1], y.shape[2]
    for i in range(n):
        row = i * LANES
        for channel in range(low, high, LANES):
            at, count = (batch * time + tokens[i]) * dim + channel, high - channel
            y_t = load(s, Y + row)
            if z.shape[0] > 0:
                gate = load_some(z, at, count)
                y_t = y_t * gate * sigmoid(gate)
            store_some(y, at, y_t, count)
            row += GROUP


@jit_views
def forwards(s, base, bc, a, h, at, pairs, ends, fresh, runs, negative):
    """Y += <c, h> and the new h. `a` is in units of log 2."""
    wide_vectors()
    one = fill(ONE)
    for n in range(0, pairs, 2):
        a0, a1 = load(a, at + n * LANES), load(a, at + (n + 1) * LANES)
        h0, h1 = load(h, at + n * LANES), load(h, at + (n + 1) * LANES)
        i = 0
        for run in range(runs):
            if fresh[run]:
                h0 = fill(ZERO)
                h1 = fill(ZERO)
            while i < ends[run]:
                row = base + i * LANES
                step, u = load(s, STEP + row), load(s, U + row)
                b, c = 2 * i * pairs + n, (2 * i + 1) * pairs + n
                decay0, decay1 = exp2(step * a0), exp2(step * a1)
                if negative:
                    decay0 = decay0 + decay0 - one
                    decay1 = decay1 + decay1 - one
                h0 = decay0 * h0 + u * splat(bc, b)
                h1 = decay1 * h1 + u * splat(bc, b + 1)
                store(s, Y + row, load(s, Y + row) + h0 * splat(bc, c) + h1 * splat(bc, c + 1))
                i += 1
        store(h, at + n * LANES, h0)
        store(h, at + (n + 1) * LANES, h1)


@jit_views
def load_gradients(dy, z, batch, low, high, tokens, n, s):
    """DY, the gradient of the output before its gate; nothing yet in DU and DSTEP."""
    wide_vectors()
    time, dim = dy.shape[1], dy.shape[2]
    for i in range(n):
        row = i * LANES
        for channel in range(low, high, LANES):
            at, count = (batch * time + tokens[i]) * dim + channel, high - channel
            flow = load_some(dy, at, count)
            if z.shape[0] > 0:
                gate = load_some(z, at, count)
                flow = flow * gate * sigmoid(gate)
            store(s, DY + row, flow)
            store(s, DU + row, fill(ZERO))
            store(s, DSTEP + row, fill(ZERO))
            row += GROUP


@jit_views
def backwards(s, base, bc, a, h, flow, da, at, pairs, ends, fresh, runs, negative, sums):
    """From h before the window and the gradient `flow` of h after it: DU, DSTEP, and that of h before it in `flow`.

    The decays, and what they keep of h, are computed once more on the way there. `sums` gets the products whose sums
    over all channels are the gradients of b and c, lane by lane; Y becomes the output before its gate.
    """
    wide_vectors()
    one = fill(ONE)
    half = pairs * ROW
    for n in range(0, pairs, 2):
        first, second = at + n * LANES, at + (n + 1) * LANES
        a0, a1 = load(a, first), load(a, second)
        h0, h1 = load(h, first), load(h, second)
        i = 0
        for run in range(runs):
            if fresh[run]:
                h0 = fill(ZERO)
                h1 = fill(ZERO)
            while i < ends[run]:
                now = i * LANES
                row, sum_c = base + now, half + n * ROW + now
                step, u, dy = load(s, STEP + row), load(s, U + row), load(s, DY + row)
                b, c = 2 * i * pairs + n, (2 * i + 1) * pairs + n
                decay0, decay1 = exp2(step * a0), exp2(step * a1)
                if negative:
                    decay0 = decay0 + decay0
                    decay1 = decay1 + decay1
                kept0, kept1 = decay0 * h0, decay1 * h1
                store(s, KEPT + now, kept0)  # the derivative of the decayed h by the exponent
                store(s, KEPT + ROW + now, kept1)
                if negative:
                    decay0 = decay0 - one
                    decay1 = decay1 - one
                    kept0 = kept0 - h0
                    kept1 = kept1 - h1
                store(s, DECAY + now, decay0)
                store(s, DECAY + ROW + now, decay1)
                h0 = kept0 + u * splat(bc, b)
                h1 = kept1 + u * splat(bc, b + 1)
                store(s, Y + row, load(s, Y + row) + h0 * splat(bc, c) + h1 * splat(bc, c + 1))
                store(sums, sum_c, load(sums, sum_c) + dy * h0)
                store(sums, sum_c + ROW, load(sums, sum_c + ROW) + dy * h1)
                i += 1

        flow0, flow1 = load(flow, first), load(flow, second)
        da0, da1 = load(da, first), load(da, second)
        for back in range(runs):
            run = runs - 1 - back
            begin = ends[run - 1] if run > 0 else 0
            while i > begin:
                i -= 1
                now = i * LANES
                row, sum_b = base + now, n * ROW + now
                step, u, dy = load(s, STEP + row), load(s, U + row), load(s, DY + row)
                b, c = 2 * i * pairs + n, (2 * i + 1) * pairs + n
                g0, g1 = flow0 + dy * splat(bc, c), flow1 + dy * splat(bc, c + 1)
                store(sums, sum_b, load(sums, sum_b) + g0 * u)
                store(sums, sum_b + ROW, load(sums, sum_b + ROW) + g1 * u)
                store(s, DU + row, load(s, DU + row) + g0 * splat(bc, b) + g1 * splat(bc, b + 1))
                exponent0, exponent1 = g0 * load(s, KEPT + now), g1 * load(s, KEPT + ROW + now)
                store(s, DSTEP + row, load(s, DSTEP + row) + exponent0 * a0 + exponent1 * a1)
                da0 = da0 + exponent0 * step
                da1 = da1 + exponent1 * step
                flow0 = load(s, DECAY + now) * g0
                flow1 = load(s, DECAY + ROW + now) * g1
            if fresh[run]:
                flow0 = fill(ZERO)
                flow1 = fill(ZERO)
        store(flow, first, flow0)
        store(flow, second, flow1)
        store(da, first, da0)
        store(da, second, da1)


@jit_views
def store_gradients(z, d, bias, dy, batch, low, high, tokens, n, s, dx, ddt, dz, dd, dbias):
    """dx, ddt, dz of the window's tokens, and their share of dd and dbias."""
    wide_vectors()
    time, dim = dy.shape[1], dy.shape[2]
    one = fill(ONE)
    for i in range(n):
        row = i * LANES
        for channel in range(low, high, LANES):
            at, count = (batch * time + tokens[i]) * dim + channel, high - channel
            x, flow, du = load(s, X + row), load(s, DY + row), load(s, DU + row)
            dstep = load(s, DSTEP + row) * fill(LN2) + du * x
            if bias.shape[0] > 0:
                dstep = dstep * load(s, SLOPE + row)
            if z.shape[0] > 0:
                gate = load_some(z, at, count)
                opening = sigmoid(gate)
                slope = opening * (one + gate * (one - opening))
                store_some(dz, at, load_some(dy, at, count) * load(s, Y + row) * slope, count)
            store_some(dx, at, du * load(s, STEP + row) + flow * load_some(d, channel, count), count)
            store_some(ddt, at, dstep, count)
            store(s, DSTEP + row, dstep)
            row += GROUP
    row = 0
    for channel in range(low, high, LANES):
        at, count = batch * dim + channel, high - channel
        skip, offset = load_some(dd, at, count), load_some(dbias, at, count)
        for i in range(n):
            skip = skip + load(s, DY + row + i * LANES) * load(s, X + row + i * LANES)
            offset = offset + load(s, DSTEP + row + i * LANES)
        store_some(dd, at, skip, count)
        store_some(dbias, at, offset, count)
        row += GROUP


@jit_views
def store_sums(sums, states, tokens, n, at, db, dc):
    """The gradients of b and c (laid flat), over the channels of one problem; `at` is the row's first token."""
    wide_vectors()
    half = (states + states % 2) * ROW
    for i in range(n):
        place = at + tokens[i] * states
        for m in range(states):
            vector = m * ROW + i * LANES
            db[place + m] = total(load(sums, vector))
            dc[place + m] = total(load(sums, half + vector))
