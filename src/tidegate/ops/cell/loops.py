"""What the generated kernels of cells are built from, beside their passes: products, and the rows of a block's states.

A block is up to R rows of the batch and one head. Its scratch holds each state as R rows of w floats, a multiple of a
vector.
"""

from __future__ import annotations

from tidegate.ops.kernels import LANES, copy_floats, jit_inside, jit_views
from tidegate.ops.passes import elementwise
from tidegate.ops.tiles import WIDTHS, product

PANEL = WIDTHS[0] * LANES  # columns of a recurrent matrix that lie together: those of one tile of a product

_product, _product_added = product(), product("add")


def _add_share(before, mean, share):
    return before + mean * share


add_mean = elementwise(_add_share)


@jit_inside
def pad(d):
    return (d + LANES - 1) // LANES * LANES


@jit_inside
def panels(begin, end, rows, columns, o, at_o, row_o, a, at_a, row_a, u, head, inner, added):
    """The panels from `begin` to `end` of o = a @ u[head], or with `added` of o += a @ u[head]."""
    base = head * ((columns + PANEL - 1) // PANEL * PANEL) * inner
    for c in range(begin * PANEL, min(columns, end * PANEL), PANEL):
        n, panel = min(PANEL, columns - c), (u, base + c * inner, PANEL)
        if added:
            _product_added(rows, n, (o, at_o + c, row_o), (a, at_a, row_a, 1), panel, inner, (), (a, 0, 0))
        else:
            _product(rows, n, (o, at_o + c, row_o), (a, at_a, row_a, 1), panel, inner, (), (a, 0, 0))


@jit_views
def pack(begin, end, matrices, own, H, d, outputs, inner, transposed, packed):
    """Matrices (M, H, d, d) as panels (H, panels, depth, PANEL): all U.T in `own` side by side, or U below each other.

    Of each matrix the first `outputs` rows and `inner` columns count. A problem is a panel of a head; what is no column
    of its last one is zero.
    """
    both = own.shape[0] * outputs
    columns, depth = (inner, both) if transposed else (both, inner)
    panels = (columns + PANEL - 1) // PANEL
    for problem in range(begin, end):
        head, first, at = problem // panels, problem % panels * PANEL, problem * depth * PANEL
        there = min(PANEL, columns - first)
        if there < PANEL:
            for j in range(at, at + depth * PANEL):
                packed[j] = 0.0
        if transposed:
            for k in range(depth):
                row = ((own[k // outputs] * H + head) * d + k % outputs) * d
                copy_floats(matrices, row + first, packed, at + k * PANEL, there)
        else:
            for k in range(0, depth, LANES):  # so that what is written stays in the first cache
                for j in range(there):
                    row = ((own[(first + j) // outputs] * H + head) * d + (first + j) % outputs) * d
                    for i in range(k, min(k + LANES, depth)):
                        packed[at + i * PANEL + j] = matrices[row + i]


@jit_inside
def load_states(states, rows, R, d, w, D, source, at, row, scratch):
    """Into the scratch; what is no channel there is zero."""
    for s in range(states):
        for r in range(rows):
            for j in range(d, w):
                scratch[(s * R + r) * w + j] = 0.0
            copy_floats(source, at + r * row + s * D, scratch, (s * R + r) * w, d)


@jit_inside
def store_states(states, rows, R, d, w, D, scratch, target, at, row):
    for s in range(states):
        for r in range(rows):
            copy_floats(scratch, (s * R + r) * w, target, at + r * row + s * D, d)


@jit_inside
def clear(x, at, count):
    for j in range(at, at + count):
        x[j] = 0.0


@jit_inside
def clear_starts(states, rows, R, w, codes, at, row, scratch):
    """A document begins with nothing."""
    for r in range(rows):
        if codes[at + r * row] == 1:
            for s in range(states):
                clear(scratch, (s * R + r) * w, w)


@jit_inside
def add(x, target, source, count):
    for j in range(count):
        x[target + j] += x[source + j]


@jit_inside
def finish_step(states, rows, R, w, codes, at, row, cut, clip, scratch):
    """The gradient of the states before becomes what flows into the step before.

    Padding leaves what flows past it, a document's beginning lets nothing through, nor does a `cut`.
    """
    before = states * R * w
    for r in range(rows):
        code = codes[at + r * row] if codes.shape[0] > 0 else 0
        if code == 2:
            continue
        for s in range(states):
            here = (s * R + r) * w
            if code == 1 or cut:
                clear(scratch, here, w)
            elif clip > 0:
                for j in range(here, here + w):
                    scratch[j] = min(max(scratch[before + j], -clip), clip)
            else:
                copy_floats(scratch, before + here, scratch, here, w)


@jit_inside
def store_gradients(vectors, d, w, scratch, sums, target, at):
    for i in range(vectors):
        copy_floats(scratch, sums + i * w, target, at + i * d, d)
