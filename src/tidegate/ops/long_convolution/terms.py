"""The compiled loops of long convolutions: sums term by term, and the way between rows and columns.

A document is a list of row numbers, those of its tokens in x, ~row for one in the past. For the sums a problem is LANES
channels, one in each lane of a vector, over all documents. Filters are (taps, D), the taps of the lags -front, ..., 0,
1, ... one below the other. Scratch begins with the BLOCK vectors that a sum, or several side by side, gives.
"""

from __future__ import annotations

import numpy as np

from tidegate.ops.kernels import LANES, inline, jit, jit_views, wide_vectors
from tidegate.ops.vector import fill, load, load_some, store, store_some

BLOCK = 8  # sums formed side by side
EDGE = BLOCK * LANES  # zeros around a row of scratch, so that a block may reach over its ends
TILE = 64  # tokens turned from rows to columns at a time
ZERO = np.float32(0.0)


# -- term by term ------------------------------------------------------------------------------------------------------
@jit_views
def _copy_in(x, past, source, begin, n, channel, dim, s, at, step):
    """The document's rows, LANES channels of them, to scratch from `at` on, `step` apart."""
    wide_vectors()
    for i in range(n):
        row = source[begin + i]
        if row >= 0:
            value = load_some(x, row * dim + channel, dim - channel)
        else:
            value = load_some(past, ~row * dim + channel, dim - channel)
        store(s, at + i * step, value)


@jit_views
def _clear(s, at, count):
    for i in range(count):
        s[at + i] = ZERO


@jit_views
def _sum(s, x, low, high, taps):
    """The sum over i from `low` to `high` of x_i times tap -i: vectors at x + i LANES and taps - i LANES."""
    wide_vectors()
    a, b, c, d = fill(ZERO), fill(ZERO), fill(ZERO), fill(ZERO)
    i = low
    while i + 4 <= high:
        at, tap = x + i * LANES, taps - i * LANES
        a = a + load(s, at) * load(s, tap)
        b = b + load(s, at + LANES) * load(s, tap - LANES)
        c = c + load(s, at + 2 * LANES) * load(s, tap - 2 * LANES)
        d = d + load(s, at + 3 * LANES) * load(s, tap - 3 * LANES)
        i += 4
    while i < high:
        a = a + load(s, x + i * LANES) * load(s, taps - i * LANES)
        i += 1
    store(s, 0, a + b + (c + d))


@jit_views
def _sums(s, x, low, high, taps):
    """As `_sum`, with BLOCK taps each, those that follow: what the tokens from here on see of the same x."""
    wide_vectors()
    a, b, c, d = fill(ZERO), fill(ZERO), fill(ZERO), fill(ZERO)
    e, f, g, h = fill(ZERO), fill(ZERO), fill(ZERO), fill(ZERO)
    for i in range(low, high):
        value, tap = load(s, x + i * LANES), taps - i * LANES
        a = a + value * load(s, tap)
        b = b + value * load(s, tap + LANES)
        c = c + value * load(s, tap + 2 * LANES)
        d = d + value * load(s, tap + 3 * LANES)
        e = e + value * load(s, tap + 4 * LANES)
        f = f + value * load(s, tap + 5 * LANES)
        g = g + value * load(s, tap + 6 * LANES)
        h = h + value * load(s, tap + 7 * LANES)
    store(s, 0, a)
    store(s, LANES, b)
    store(s, 2 * LANES, c)
    store(s, 3 * LANES, d)
    store(s, 4 * LANES, e)
    store(s, 5 * LANES, f)
    store(s, 6 * LANES, g)
    store(s, 7 * LANES, h)


@jit_views
def _convolve(s, x, count, taps, causal, first, n, source, begin, backwards, channel, dim, y, past):
    """Rows `first` to n of the document get sum_i tap_{t - i} x_i over i < count; backwards the document runs so."""
    wide_vectors()
    t = first
    while t < n:
        width = BLOCK if t + BLOCK <= n else 1
        high = min(count, t + width) if causal else count
        if width == 1:
            _sum(s, x, 0, high, taps + t * LANES)
        else:
            _sums(s, x, 0, high, taps + t * LANES)
        for k in range(width):
            row = source[begin + (n - 1 - t - k if backwards else t + k)]
            if row >= 0:
                store_some(y, row * dim + channel, load(s, k * LANES), dim - channel)
            else:
                store_some(past, ~row * dim + channel, load(s, k * LANES), dim - channel)
        t += width


@jit_views
def _load_taps(taps, front, longest, channel, dim, s, at):
    """The taps of lags up to `longest` either way around `at`, zeros where there are none."""
    wide_vectors()
    _clear(s, at - longest * LANES - EDGE, 2 * longest * LANES + 2 * EDGE)
    for lag in range(-min(front, longest), min(taps.shape[0] - front, longest)):
        store(s, at + lag * LANES, load_some(taps, (front + lag) * dim + channel, dim - channel))


@jit
def forward(begin, end, s, x, past, taps, front, longest, source, ends, firsts, y):
    wide_vectors()
    dim = taps.shape[1]
    values, filters = 2 * EDGE, 4 * EDGE + 2 * longest * LANES
    for problem in range(begin, end):
        channel = problem * LANES
        _load_taps(taps, front, longest, channel, dim, s, filters)
        low = 0
        for document in range(ends.shape[0]):
            n = ends[document] - low
            _copy_in(x, past, source, low, n, channel, dim, s, values, LANES)
            _convolve(s, values, n, filters, front == 0, firsts[document], n, source, low, False, channel, dim, y, y)
            low = ends[document]


@jit_views
def _add_products(x, y, out):
    wide_vectors()
    for j in range(out.shape[0]):
        out[j] += x[j] * y[j]


@jit_views
def _add_four_products(x0, x1, x2, x3, y0, y1, y2, y3, out):
    wide_vectors()
    for j in range(out.shape[0]):
        out[j] += (x0[j] * y0[j] + x1[j] * y1[j]) + (x2[j] * y2[j] + x3[j] * y3[j])


@inline
def _row(x, past, row, low, high):
    return x[row, low:high] if row >= 0 else past[~row, low:high]


@jit
def steps(begin, end, block, x, past, taps, source, begins, ends, firsts, y):
    """Few new tokens: a problem is a document and a block of channels, and its rows are read as they come. Causal."""
    dim = taps.shape[1]
    blocks = (dim + block - 1) // block
    for problem in range(begin, end):
        document, low = problem // blocks, problem % blocks * block
        high, first = min(low + block, dim), begins[document]
        for t in range(firsts[document], ends[document] - first):
            out, i = y[source[first + t], low:high], 0
            out[:] = ZERO
            while i + 4 <= t + 1:
                x0, x1 = _row(x, past, source[first + i], low, high), _row(x, past, source[first + i + 1], low, high)
                x2, x3 = (
                    _row(x, past, source[first + i + 2], low, high),
                    _row(x, past, source[first + i + 3], low, high),
                )
                y0, y1, y2, y3 = (
                    taps[t - i, low:high],
                    taps[t - i - 1, low:high],
                    taps[t - i - 2, low:high],
                    taps[t - i - 3, low:high],
                )
                _add_four_products(x0, x1, x2, x3, y0, y1, y2, y3, out)
                i += 4
            while i <= t:
                _add_products(_row(x, past, source[first + i], low, high), taps[t - i, low:high], out)
                i += 1


@jit_views
def _correlate(s, x, dy, n, first, front, count, dtaps):
    """The tap of lag l gets sum_t dy_t x_{t - l}; dy lies backwards."""
    wide_vectors()
    lag = -min(front, n - 1)
    while lag < min(n, count):
        # The sum over j = n - 1 - t, of dy_j and what lies at n - 1 - lag - j: as in a convolution, but the lags fall.
        low, high = max(0, -lag - (BLOCK - 1)), min(n - first, n - lag)
        _sums(s, dy, low, high, x + (n - BLOCK - lag) * LANES)
        for k in range(BLOCK):
            at = dtaps + (lag + BLOCK - 1 - k) * LANES
            store(s, at, load(s, at) + load(s, k * LANES))
        lag += BLOCK


@jit
def backward(begin, end, s, x, past, taps, front, longest, source, ends, firsts, dy, dx, dpast, dtaps):
    wide_vectors()
    dim = taps.shape[1]
    values, flow = 2 * EDGE, 4 * EDGE + longest * LANES
    filters = flow + 2 * EDGE + 2 * longest * LANES
    sums = filters + 2 * EDGE + 2 * longest * LANES
    count = taps.shape[0] - front
    for problem in range(begin, end):
        channel = problem * LANES
        _load_taps(taps, front, longest, channel, dim, s, filters)
        _clear(s, sums - longest * LANES - EDGE, 2 * longest * LANES + 2 * EDGE)
        low = 0
        for document in range(ends.shape[0]):
            n, first = ends[document] - low, firsts[document]
            _clear(s, values - EDGE, EDGE)
            _copy_in(x, past, source, low, n, channel, dim, s, values, LANES)
            _clear(s, values + n * LANES, EDGE)
            _copy_in(dy, dy, source, low + first, n - first, channel, dim, s, flow + (n - 1 - first) * LANES, -LANES)
            _convolve(s, flow, n - first, filters, front == 0, 0, n, source, low, True, channel, dim, dx, dpast)
            _correlate(s, values, flow, n, first, front, count, sums)
            low = ends[document]
        for lag in range(-min(front, longest), min(count, longest)):
            store_some(dtaps, (front + lag) * dim + channel, load(s, sums + lag * LANES), dim - channel)


# -- between rows and columns ------------------------------------------------------------------------------------------
@jit
def to_columns(begin, end, s, x, past, source, begins, ends, low, out):
    """out (documents, channels, size): channel `low` and the next ones of each document, then zeros.

    A problem is a document and LANES channels. More would be read from the same cache lines, but columns lie a power of
    two apart, and what is written to many of them evicts itself.
    """
    wide_vectors()
    dim, width = x.shape[1], out.shape[1]
    groups = (width + LANES - 1) // LANES
    for problem in range(begin, end):
        document, channel = problem // groups, problem % groups * LANES
        first, n, some = begins[document], ends[document] - begins[document], min(LANES, width - channel)
        for tile in range(0, n, TILE):
            many = min(TILE, n - tile)
            _copy_in(x, past, source, first + tile, many, low + channel, dim, s, 0, LANES)
            for lane in range(some):
                row = out[document, channel + lane, tile : tile + many]
                for i in range(many):
                    row[i] = s[i * LANES + lane]
        for lane in range(some):
            out[document, channel + lane, n:] = ZERO


@jit
def to_rows(begin, end, s, columns, source, begins, ends, firsts, low, y, past):
    """The way back, for the tokens from `firsts` on."""
    wide_vectors()
    dim, width = y.shape[1], columns.shape[1]
    groups = (width + LANES - 1) // LANES
    for problem in range(begin, end):
        document, channel = problem // groups, problem % groups * LANES
        first, n, some = begins[document], ends[document] - begins[document], min(LANES, width - channel)
        for tile in range(firsts[document], n, TILE):
            many = min(TILE, n - tile)
            for lane in range(some):
                row = columns[document, channel + lane, tile : tile + many]
                for i in range(many):
                    s[i * LANES + lane] = row[i]
            for i in range(many):
                row_number = source[first + tile + i]
                if row_number >= 0:
                    store_some(y, row_number * dim + low + channel, load(s, i * LANES), some)
                else:
                    store_some(past, ~row_number * dim + low + channel, load(s, i * LANES), some)
