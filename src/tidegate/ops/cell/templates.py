"""The text of a cell's kernels around its passes: the loops over time, the same for every cell but for its numbers.

Upper case stands for how many a cell has: G inputs, M products, V vectors, S states, E kept quantities, Q means.
`narrow` are the channels of projected states (see Program.projected), else d. `kept` tokens have memory of their own in
old, p, e and mu: all T, or one where there is no backward, `now` being the current token's place.
"""

HEAD = '''"""Kernels of a cell, written by tidegate.ops.cell from these equations:

{equations}
"""

from tidegate.ops.cell.loops import add, add_mean, clear, clear_starts, finish_step, load_states, pad
from tidegate.ops.cell.loops import store_gradients, store_states
from tidegate.ops.cell.team import help_out, multiply, wait
from tidegate.ops.kernels import jit_views
from tidegate.ops.passes import elementwise, exp, log, sigmoid, softplus, sqrt, tanh, where_negative


'''

FORWARD = """@jit_views
def forward(
    begin, end, scratch, board, R, B, T, H, d, narrow, kept, x, v, state, codes, {weights}
    y, last, old, p, e, mu
):
    D, w, masked = H * d, pad(d), codes.shape[0] > 0
    for problem in range(begin, end):
        head, b = problem % H, problem // H * R
        rows = min(R, B - b)
        load_states({S}, rows, R, d, w, D, state, b * {SD} + head * d, {SD}, scratch)
        for t in range(T):
            now = t if kept == T else 0
            if masked:
                clear_starts({S}, rows, R, w, codes, b * T + t, T, scratch)
{places}            store_states({S}, rows, R, d, w, D, scratch, old, at_s, row_s)
{steps}        store_states({S}, rows, R, d, w, D, scratch, last, b * {SD} + head * d, {SD})


"""

BACKWARD = """@jit_views
def backward(
    begin, end, scratch, board, R, B, T, H, d, narrow, clip, cut, x, v, codes, {weights}
    old, p, e, mu, dy, dlast, dx, dp, dv, dstate
):
    D, w, masked = H * d, pad(d), codes.shape[0] > 0
    flow, before, de = 0, {S} * R * w, {SS} * R * w
    dmu = de + {E} * R * w
    sums = dmu + {Q1} * R
    for problem in range(begin, end):
        head, b = problem % H, problem // H * R
        rows = min(R, B - b)
        load_states({S}, rows, R, d, w, D, dlast, b * {SD} + head * d, {SD}, scratch)
        clear(scratch, sums, {V} * w)
        if narrow < d:  # what products leave alone of a gradient stays zero
            clear(scratch, before, {S} * R * w)
        for t in range(T - 1, -1, -1):
            now, kept = t, T
{places}{steps}            finish_step({S}, rows, R, w, codes, b * T + t, T, cut > 0 and t % cut == 0, clip, scratch)
        store_states({S}, rows, R, d, w, D, scratch, dstate, b * {SD} + head * d, {SD})
        store_gradients({V}, d, w, scratch, sums, dv, problem * {V} * d)


"""

# Where a token's rows begin in each array, and how far apart they are; left out for what a cell does not have.
PLACES = {
    "G": "at_x, row_x = (b * T + t) * {n} + head * d, T * {n}",
    "M": "at_p, row_p = ((b * kept + now) * H + head) * {n}, kept * H * {n}",
    "S": "at_s, row_s = (b * kept + now) * {n} + head * d, kept * {n}",
    "E": "at_e, row_e = (b * kept + now) * {n} + head * d, kept * {n}",
    "Q": "at_m = (now * H + head) * {n} + b",
}

ROWS = """            r = 0
            while r < rows:
                n = 1 if masked else rows
                if not masked or codes[(b + r) * T + t] != 2:
                    {bases}
{calls}                r += n
"""
