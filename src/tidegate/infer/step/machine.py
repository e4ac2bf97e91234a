"""The step machine: a small interpreter of tensor instructions, compiled once and for every model.

A step of a recurrent layer at batch 1 is some forty operations on a few hundred numbers each. PyTorch takes five
microseconds to begin any of them, which is more than the arithmetic. Here an instruction begins in some ten
nanoseconds: a program is a table of integers (what to do, on which addresses, with which strides), and the loop over
its rows never leaves compiled code.

Numbers are float32, or float64 for positions and angles; truth values are 0 and 1. Long rows of products are cut into
pieces that any idle thread may take; the pieces are the same for any number of threads, and so are the results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from tidegate.infer.step.rows import Op, binary, double, scaled, unary
from tidegate.ops.kernels import jit_views, wide_vectors

# Columns of the table. An operand is (base, byte offset, four strides in elements); the result comes first.
OPCODE, DOUBLE, JOB, SIZES, OPERANDS = 0, 1, 2, 3, 7
O, A, B, C, D = (OPERANDS + 6 * operand + 2 for operand in range(5))  # where their strides begin
WIDTH = OPERANDS + 5 * 6
PIECE = 1 << 15  # multiplications in one piece of a product


@intrinsic
def _floats(typing_context, address, count):
    """The float32 array of `count` numbers at an address."""
    return _at(types.float32)


@intrinsic
def _doubles(typing_context, address, count):
    """The float64 array at an address."""
    return _at(types.float64)


@intrinsic
def _integers(typing_context, address, count):
    """The int64 array at an address."""
    return _at(types.int64)


@intrinsic
def _bytes(typing_context, address, count):
    """The uint8 array at an address."""
    return _at(types.uint8)


def _at(element: Any) -> Any:
    kind = types.Array(element, 1, "C")
    signature = kind(types.int64, types.int64)

    def generate(context, builder, signature, arguments):
        address, count = arguments
        array = arrayobj.make_array(kind)(context, builder)
        size = ir.Constant(address.type, context.get_abi_sizeof(context.get_data_type(element)))
        data = builder.inttoptr(address, context.get_data_type(element).as_pointer())
        arrayobj.populate_array(array, data, cgutils.pack_array(builder, [count]), [size], size, None, None)
        return array._getvalue()

    return signature, generate


@intrinsic
def _take(typing_context, counters, index):
    """counters[index] += 1 for all threads; the value before."""

    def generate(context, builder, signature, arguments):
        data = arrayobj.make_array(signature.args[0])(context, builder, arguments[0]).data
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), one, "seq_cst")

    return types.int64(counters, types.int64), generate


@intrinsic
def _look(typing_context, counters, index):
    """counters[index] as the other threads last left it."""

    def generate(context, builder, signature, arguments):
        data = arrayobj.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "seq_cst", 8)

    return types.int64(counters, types.int64), generate


@intrinsic
def _give_way(typing_context):
    """Let another thread of this machine run (POSIX sched_yield)."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


# -- instructions ------------------------------------------------------------------------------------------------------
@jit_views
def _move(op, n, source, source_stride, target):
    """One row to a contiguous place, with a change of type for the instructions that are named after one."""
    reach = (n - 1) * source_stride + 1
    if op == Op.COPY:
        x, o = _floats(source, reach), _floats(target, n)
        if source_stride == 1:
            for i in range(n):
                o[i] = x[i]
        else:
            for i in range(n):
                o[i] = x[i * source_stride]
    elif op == Op.TO_DOUBLE:
        x, d = _floats(source, reach), _doubles(target, n)
        for i in range(n):
            d[i] = x[i * source_stride]
    elif op == Op.TO_FLOAT:
        d, o = _doubles(source, reach), _floats(target, n)
        for i in range(n):
            o[i] = d[i * source_stride]
    elif op == Op.INT_TO_DOUBLE:
        k, d = _integers(source, reach), _doubles(target, n)
        for i in range(n):
            d[i] = k[i * source_stride]
    elif op == Op.DOUBLE_TO_INT:
        d, k = _doubles(source, reach), _integers(target, n)
        for i in range(n):
            k[i] = np.int64(d[i * source_stride])
    else:
        c, o = _bytes(source, reach), _floats(target, n)
        for i in range(n):
            o[i] = c[i * source_stride]


@jit_views
def _row(op, n, a, a_stride, b, b_stride, c, c_stride, d, o):
    """One float32 row of an elementwise instruction; strides are 0 or 1."""
    out = _floats(o, n)
    if op < Op.ADD:
        unary(op, n, _floats(a, n), out)
    elif op < Op.FMA:
        if b_stride == 0:
            scaled(op, n, _floats(a, n), _floats(b, 1)[0], out)
        else:
            binary(op, n, _floats(a, n), _floats(b, n), out)
    elif op == Op.FMA:
        y, z = _floats(b, n), _floats(c, n)
        if a_stride == 0:
            factor = _floats(a, 1)[0]
            for i in range(n):
                out[i] = factor * y[i] + z[i]
        else:
            x = _floats(a, n)
            for i in range(n):
                out[i] = x[i] * y[i] + z[i]
    elif op == Op.WHERE:
        x, y, z = _floats(a, n), _floats(b, n), _floats(c, n)
        for i in range(n):
            out[i] = y[i] if x[i] != np.float32(0.0) else z[i]
    else:
        y, w = _floats(b, n), _floats(d, n)
        if a_stride == 0 and c_stride == 0:
            first, second = _floats(a, 1)[0], _floats(c, 1)[0]
            for i in range(n):
                out[i] = first * y[i] + second * w[i]
        else:
            x, z = _floats(a, (n - 1) * a_stride + 1), _floats(c, (n - 1) * c_stride + 1)
            for i in range(n):
                out[i] = x[i * a_stride] * y[i] + z[i * c_stride] * w[i]


@jit_views
def _elementwise(row, at):
    """Instructions up to TWO_PRODUCTS, over up to four axes; `at` holds the operands' addresses."""
    op, wide, n = row[OPCODE], row[DOUBLE], row[SIZES + 3]
    to, source = 8 if wide else 4, 8 if wide else 4  # bytes of an element of the result, and of the operands
    if op == Op.TO_DOUBLE or op == Op.INT_TO_DOUBLE or op == Op.DOUBLE_TO_INT:
        to = 8
    if op == Op.TO_FLOAT or op == Op.INT_TO_DOUBLE or op == Op.DOUBLE_TO_INT:
        source = 8
    if op == Op.BYTE_TO_FLOAT:
        source = 1
    for i in range(row[SIZES]):
        for j in range(row[SIZES + 1]):
            for k in range(row[SIZES + 2]):
                o = at[0] + to * (i * row[O] + j * row[O + 1] + k * row[O + 2])
                a = at[1] + source * (i * row[A] + j * row[A + 1] + k * row[A + 2])
                if op < Op.EXP and not wide:
                    _move(op, n, a, row[A + 3], o)
                    continue
                b = at[2] + source * (i * row[B] + j * row[B + 1] + k * row[B + 2])
                c = at[3] + source * (i * row[C] + j * row[C + 1] + k * row[C + 2])
                if wide:
                    x, y = _doubles(a, (n - 1) * row[A + 3] + 1), _doubles(b, (n - 1) * row[B + 3] + 1)
                    z, w = _doubles(c, (n - 1) * row[C + 3] + 1), _doubles(o, n)
                    for m in range(n):
                        w[m] = double(op, x[m * row[A + 3]], y[m * row[B + 3]], z[m * row[C + 3]])
                else:
                    d = at[4] + 4 * (i * row[D] + j * row[D + 1] + k * row[D + 2])
                    _row(op, n, a, row[A + 3], b, row[B + 3], c, row[C + 3], d, o)


@jit_views
def _reduce(row, at):
    """SUM and its like over the last axis, float32 (float64 is not needed)."""
    wide_vectors()
    n, stride = row[SIZES + 3], row[A + 3]
    for i in range(row[SIZES]):
        for j in range(row[SIZES + 1]):
            for k in range(row[SIZES + 2]):
                x = _floats(at[1] + 4 * (i * row[A] + j * row[A + 1] + k * row[A + 2]), (n - 1) * stride + 1)
                o = _floats(at[0] + 4 * (i * row[O] + j * row[O + 1] + k * row[O + 2]), 1)
                total = x[0]
                if row[OPCODE] == Op.SUM:
                    if stride == 1:
                        total = np.float32(0.0)
                        for m in range(n):
                            total += x[m]
                    else:
                        for m in range(1, n):
                            total += x[m * stride]
                else:
                    for m in range(1, n):
                        value = x[m * stride]
                        better = value > total if row[OPCODE] == Op.ROW_MAX else value < total
                        total = value if better or value != value else total
                o[0] = total


@jit_views
def _dots(a, a_row, rows, b, b_column, columns, o, o_row, inner):
    """O[m, c] = sum_j A[m, j] B[c, j], rows of A and B contiguous: a layer's weights are read once, along memory."""
    wide_vectors()
    zero = np.float32(0.0)
    whole = columns - columns % 4
    for c in range(0, whole, 4):
        b0, b1 = _floats(b + 4 * c * b_column, inner), _floats(b + 4 * (c + 1) * b_column, inner)
        b2, b3 = _floats(b + 4 * (c + 2) * b_column, inner), _floats(b + 4 * (c + 3) * b_column, inner)
        for m in range(rows):
            x, out = _floats(a + 4 * m * a_row, inner), _floats(o + 4 * (m * o_row + c), 4)
            s0, s1, s2, s3 = zero, zero, zero, zero
            for j in range(inner):
                s0 += x[j] * b0[j]
                s1 += x[j] * b1[j]
                s2 += x[j] * b2[j]
                s3 += x[j] * b3[j]
            out[0], out[1], out[2], out[3] = s0, s1, s2, s3
    for c in range(whole, columns):
        y = _floats(b + 4 * c * b_column, inner)
        for m in range(rows):
            x, out = _floats(a + 4 * m * a_row, inner), _floats(o + 4 * (m * o_row + c), 1)
            total = zero
            for j in range(inner):
                total += x[j] * y[j]
            out[0] = total


@jit_views
def _sums_of_rows(a, a_row, a_inner, rows, b, b_inner, columns, o, o_row, inner):
    """O[m] = sum_j A[m, j] B[j], rows of B contiguous: reading a matrix state with a query."""
    wide_vectors()
    for m in range(rows):
        out = _floats(o + 4 * m * o_row, columns)
        x = _floats(a + 4 * m * a_row, (inner - 1) * a_inner + 1)
        for c in range(columns):
            out[c] = np.float32(0.0)
        whole = inner - inner % 4
        for j in range(0, whole, 4):
            b0, b1 = _floats(b + 4 * j * b_inner, columns), _floats(b + 4 * (j + 1) * b_inner, columns)
            b2, b3 = _floats(b + 4 * (j + 2) * b_inner, columns), _floats(b + 4 * (j + 3) * b_inner, columns)
            x0, x1, x2, x3 = x[j * a_inner], x[(j + 1) * a_inner], x[(j + 2) * a_inner], x[(j + 3) * a_inner]
            for c in range(columns):
                out[c] += x0 * b0[c] + x1 * b1[c] + x2 * b2[c] + x3 * b3[c]
        for j in range(whole, inner):
            y, factor = _floats(b + 4 * j * b_inner, columns), x[j * a_inner]
            for c in range(columns):
                out[c] += factor * y[c]


@jit_views
def _piece(row, at, piece):
    """One piece of a product, sizes (batch, rows, columns, inner): a range of the columns of one matrix.

    Strides are those of (batch, row, column), (batch, row, inner) and (batch, inner, column).
    """
    batch, rows, columns, inner = row[SIZES], row[SIZES + 1], row[SIZES + 2], row[SIZES + 3]
    across = pieces_of(row)
    width = -(-columns // across)
    b_index, first = piece // across, (piece % across) * width
    last = min(columns, first + width)
    o = at[0] + 4 * (b_index * row[O] + first * row[O + 2])
    a = at[1] + 4 * b_index * row[A]
    b = at[2] + 4 * (b_index * row[B] + first * row[B + 2])
    if first >= last or b_index >= batch:
        return
    if row[B + 1] == 1 and row[A + 2] == 1:
        _dots(a, row[A + 1], rows, b, row[B + 2], last - first, o, row[O + 1], inner)
    else:
        _sums_of_rows(a, row[A + 1], row[A + 2], rows, b, row[B + 1], last - first, o, row[O + 1], inner)


@jit_views
def pieces_of(row):
    """Into how many column ranges each matrix of a product is cut."""
    work = row[SIZES + 1] * row[SIZES + 2] * row[SIZES + 3]
    return max(1, min(row[SIZES + 2] // 16, work // PIECE))


@jit_views
def _table_rows(row, at):
    """O[i] = table[index[i]]: sizes (1, 1, count, width); operands: index, table."""
    width = row[SIZES + 3]
    index = _integers(at[1], row[SIZES + 2])
    for i in range(row[SIZES + 2]):
        source, target = _floats(at[2] + 4 * index[i] * row[B + 2], width), _floats(at[0] + 4 * i * row[O + 2], width)
        for c in range(width):
            target[c] = source[c]


@jit_views
def _addresses(bases, row, at):
    for operand in range(5):
        at[operand] = bases[row[OPERANDS + 6 * operand]] + row[OPERANDS + 1 + 6 * operand]


@jit_views
def execute(bases, code, offered, counters, at, shared):
    """The whole program. `shared`: products are offered to other threads, who are in `help_out`.

    `offered` holds the rows of these products. counters[0] is how many have been offered so far, counters[1 + 2 j] and
    counters[2 + 2 j] how many pieces of product j are taken and done. A piece is done by whoever takes its number.
    `at` is room for the addresses of one row, for each thread its own.
    """
    for line in range(code.shape[0]):
        row = code[line]
        _addresses(bases, row, at)
        op = row[OPCODE]
        if op < Op.SUM:
            _elementwise(row, at)
        elif op < Op.MATMUL:
            _reduce(row, at)
        elif op == Op.ROWS:
            _table_rows(row, at)
        else:
            pieces, job = row[SIZES] * pieces_of(row), row[JOB]
            if job < 0 or shared == 0:
                for piece in range(pieces):
                    _piece(row, at, piece)
                continue
            _take(counters, 0)  # atomically: whoever sees it also sees everything computed before
            piece = _take(counters, 1 + 2 * job)
            while piece < pieces:
                _piece(row, at, piece)
                _take(counters, 2 + 2 * job)
                piece = _take(counters, 1 + 2 * job)
            waited = 0
            while _look(counters, 2 + 2 * job) < pieces:
                waited += 1
                if waited > 1000:
                    _give_way()
    if shared:
        _take(counters, 0)  # one more than there are: the end


@jit_views
def help_out(bases, code, offered, counters, at):
    """What the other threads do until the program ends: take pieces of the product on offer. `at`: as in `execute`."""
    seen, waited = 0, 0
    while True:
        now = _look(counters, 0)
        if now > offered.shape[0]:
            return
        if now == seen:
            waited += 1
            if waited > 20000:
                _give_way()
            continue
        seen, waited = now, 0
        job = now - 1
        row = code[offered[job]]
        _addresses(bases, row, at)
        pieces = row[SIZES] * pieces_of(row)
        piece = _take(counters, 1 + 2 * job)
        while piece < pieces:
            _piece(row, at, piece)
            _take(counters, 2 + 2 * job)
            piece = _take(counters, 1 + 2 * job)
