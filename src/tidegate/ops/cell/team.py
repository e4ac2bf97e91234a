"""Several threads at the products of one problem: few sequences of a large cell leave no other work to share.

One thread leads: it runs the kernel, and puts each product on a board. Helpers wait at the board, and whoever is free
takes panels of the product, the leader from the front and helpers from the back, so that a thread mostly meets the same
part of the matrix at every token and keeps it in its cache. The leader can finish alone. It waits only for panels that
somebody has begun; where that takes long, the machine is busy with other things, and it works alone for a while. Who
computes a panel makes no difference to it.

The board is an int64 array of a few cache lines: at CLAIM the number of the job with the panels that are free, in one
word, which is exchanged atomically; at DONE how many panels helpers have finished; from JOB on what the job is.
"""

from __future__ import annotations

import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj

from tidegate.ops.cell.loops import PANEL, panels
from tidegate.ops.kernels import jit_inside

CLAIM, DONE, JOB = 0, 8, 16  # cache lines of their own
KIND, ROWS, COLUMNS, AT_O, ROW_O, AT_A, ROW_A, HEAD, INNER, ADDED, ALONE, NEXT = (JOB + i for i in range(12))
SIZE, STOP = 32, -1
LONG = 8  # tokens from which getting others to come is worth it
PATIENCE = 1 << 16  # looks at what a helper has not finished, some 50 us: it has lost its core
PAUSES = 32, 4096  # products that the leader does alone after that, the first time and at most
WORTHWHILE = 1 << 16  # products of numbers per token; below, asking costs as much as helping saves
nobody = np.zeros(0, np.int64)  # the board of who works alone


def board() -> np.ndarray:
    """A new one, beginning with a cache line."""
    memory = np.zeros(SIZE + 8, np.int64)
    found = memory[-(memory.ctypes.data // 8) % 8 :][:SIZE]
    found[NEXT] = PAUSES[0]
    return found


def close(board: np.ndarray) -> None:
    """Send the helpers home."""
    board[CLAIM] = STOP


# -- atomic operations -------------------------------------------------------------------------------------------------
def _place(context, builder, kind, value, at):
    return builder.gep(arrayobj.make_array(kind)(context, builder, value).data, [at])


@intrinsic
def read(typing_context, x, at):
    """x[at], and everything that was written before the `write` it comes from."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_place(context, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(x, types.intp), generate


@intrinsic
def write(typing_context, x, at, value):
    """x[at] = value, after everything before it."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments[:2])
        builder.store_atomic(arguments[2], place, "release", 8)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.int64), generate


@intrinsic
def exchange(typing_context, x, at, expected, value):
    """If x[at] is `expected` make it `value`; whether it was."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments[:2])
        found = builder.cmpxchg(place, arguments[2], arguments[3], "acq_rel", "acquire")
        return builder.extract_value(found, 1)

    return types.boolean(x, types.intp, types.int64, types.int64), generate


@intrinsic
def increase(typing_context, x, at, value):
    """x[at] += value"""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments[:2])
        builder.atomic_rmw("add", place, arguments[2], "release")
        return context.get_dummy_value()

    return types.void(x, types.intp, types.int64), generate


# -- the board ---------------------------------------------------------------------------------------------------------
@jit_inside
def multiply(board, kind, rows, columns, o, at_o, row_o, a, at_a, row_a, u, head, inner, added):
    """o = a @ u[head], or with `added` o += that, u packed into panels; with others where there is a board.

    `kind` says to helpers which arrays o, a and u are.
    """
    count = (columns + PANEL - 1) // PANEL
    if board.shape[0] == 0 or rows * columns * inner < WORTHWHILE or board[ALONE] > 0:
        if board.shape[0] > 0 and board[ALONE] > 0:
            board[ALONE] -= 1
        panels(0, count, rows, columns, o, at_o, row_o, a, at_a, row_a, u, head, inner, added)
        return
    board[KIND], board[ROWS], board[COLUMNS], board[AT_O], board[ROW_O] = kind, rows, columns, at_o, row_o
    board[AT_A], board[ROW_A], board[HEAD], board[INNER], board[ADDED] = at_a, row_a, head, inner, added
    board[DONE] = 0
    write(board, CLAIM, ((board[CLAIM] >> 32) + 1) << 32 | count)
    mine, some = 0, max(1, count // 16)
    while True:
        word = read(board, CLAIM)
        front, back = word >> 16 & 0xFFFF, word & 0xFFFF
        if front >= back:
            break
        end = min(back, front + some)
        if exchange(board, CLAIM, word, word + ((end - front) << 16)):
            panels(front, end, rows, columns, o, at_o, row_o, a, at_a, row_a, u, head, inner, added)
            mine += end - front
    looks = 0
    while read(board, DONE) < count - mine:
        looks += 1
    if looks > PATIENCE:
        board[ALONE] = board[NEXT]
        board[NEXT] = min(2 * board[NEXT], PAUSES[1])


@jit_inside
def wait(board):
    """The kind of a product that has panels left, or STOP."""
    while True:
        word = read(board, CLAIM)
        if word < 0:
            return STOP
        if word >> 16 & 0xFFFF < word & 0xFFFF:
            return board[KIND]  # by now perhaps of the next one: `help_out` looks again


@jit_inside
def help_out(board, kind, o, a, u):
    """Take panels from the back of the product on the board, if it is of that kind and some are left."""
    word = read(board, CLAIM)
    front, back = word >> 16 & 0xFFFF, word & 0xFFFF
    if word < 0 or front >= back or board[KIND] != kind:
        return
    columns = board[COLUMNS]
    begin = max(front, back - max(1, (columns + PANEL - 1) // PANEL // 16))
    if exchange(board, CLAIM, word, word - (back - begin)):  # the product cannot end without us from here on
        at_o, row_o, at_a, row_a = board[AT_O], board[ROW_O], board[AT_A], board[ROW_A]
        rows, head, inner, added = board[ROWS], board[HEAD], board[INNER], board[ADDED] != 0
        panels(begin, back, rows, columns, o, at_o, row_o, a, at_a, row_a, u, head, inner, added)
        increase(board, DONE, back - begin)
