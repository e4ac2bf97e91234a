"""Small matrix products and transposes for kernels, in register tiles written out in vector instructions."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np import arrayobj

from tidegate.ops.kernels import LANES, inline, jit_views, wide_vectors


def _make_tile(rows: int, vectors: int, start: str):
    """An intrinsic for one register tile: O[:rows, :vectors*LANES] = start + A[:rows, :J] @ B[:J, :vectors*LANES].

    `start` says what the sums begin with: "zero", "add" (O itself), "rows" (O, each row times its entry of `factors`)
    or "columns" (O, each column times its entry).

    LLVM cannot prove that rows of scratch arrays do not overlap and re-reads memory after every store; written out in
    vector instructions, the accumulators stay in registers over the whole inner product.
    """

    @intrinsic
    def tile(typing_context, a, a_at, a_row, a_column, b, b_at, b_row, o, o_at, o_row, inner, factors, factor_at):
        counts = (types.intp,)
        signature = types.void(a, *counts * 3, b, *counts * 2, o, *counts * 3, factors, types.intp)

        def generate(context, builder, signature, arguments):
            a_value, a_at, a_row, a_column, b_value, b_at, b_row, o_value, o_at, o_row, inner, *scaling = arguments
            integer, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)

            def number(n):
                return ir.Constant(integer, n)

            def data(kind, value):
                return arrayobj.make_array(kind)(context, builder, value).data

            def pointer(base, offset):
                return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

            def fused(x, y, z):
                return builder.fadd(z, builder.fmul(x, y, flags=("contract",)), flags=("contract",))

            a_data, b_data = data(signature.args[0], a_value), data(signature.args[4], b_value)
            o_data = data(signature.args[7], o_value)
            factors, factor_at = data(signature.args[11], scaling[0]), scaling[1]
            undefined = ir.Constant(vector, ir.Undefined)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)

            def splat(scalar):
                first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(first, undefined, everywhere)

            cells = [(m, n) for m in range(rows) for n in range(vectors)]
            places = [
                pointer(o_data, builder.add(builder.add(o_at, builder.mul(number(m), o_row)), number(n * LANES)))
                for m, n in cells
            ]
            if start == "zero":
                initial = [ir.Constant(vector, [0.0] * LANES) for _ in cells]
            else:
                initial = [builder.load(place, align=4) for place in places]
            if start == "rows":
                ends = [builder.gep(factors, [builder.add(factor_at, number(m))]) for m in range(rows)]
                scales = [splat(builder.load(end, align=4)) for end in ends]
                initial = [builder.fmul(x, scales[m]) for x, (m, _) in zip(initial, cells, strict=True)]
            elif start == "columns":
                scales = [
                    builder.load(pointer(factors, builder.add(factor_at, number(n * LANES))), align=4)
                    for n in range(vectors)
                ]
                initial = [builder.fmul(x, scales[n]) for x, (_, n) in zip(initial, cells, strict=True)]
            before = builder.block
            loop, done = builder.append_basic_block("inner"), builder.append_basic_block("done")
            builder.cbranch(builder.icmp_signed(">", inner, number(0)), loop, done)

            builder.position_at_end(loop)
            j = builder.phi(integer)
            j.add_incoming(number(0), before)
            sums = [builder.phi(vector) for _ in cells]
            for total, value in zip(sums, initial, strict=True):
                total.add_incoming(value, before)
            b_offset = builder.add(b_at, builder.mul(j, b_row))
            a_offset = builder.add(a_at, builder.mul(j, a_column))
            columns = [
                builder.load(pointer(b_data, builder.add(b_offset, number(n * LANES))), align=4) for n in range(vectors)
            ]
            updated = []
            for m in range(rows):
                scalar = builder.load(
                    builder.gep(a_data, [builder.add(a_offset, builder.mul(number(m), a_row))]), align=4
                )
                broadcast = splat(scalar)
                updated += [fused(broadcast, columns[n], sums[m * vectors + n]) for n in range(vectors)]
            following = builder.add(j, number(1))
            j.add_incoming(following, builder.block)
            for total, new in zip(sums, updated, strict=True):
                total.add_incoming(new, builder.block)
            end = builder.block
            builder.cbranch(builder.icmp_signed("<", following, inner), loop, done)

            builder.position_at_end(done)
            results = []
            for value, new in zip(initial, updated, strict=True):
                result = builder.phi(vector)
                result.add_incoming(value, before)
                result.add_incoming(new, end)
                results.append(result)
            for place, result in zip(places, results, strict=True):
                builder.store(result, place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return tile


_tiles = {
    start: [_make_tile(4, vectors, start) for vectors in (4, 2, 1)] for start in ("zero", "add", "rows", "columns")
}


def _product(start: str, shape: str = "full"):
    """The loop over tiles. `shape` of A: "full", or square "lower" or "upper" triangular, whose zeros are left out."""
    tile4, tile2, tile1 = _tiles[start]
    by_row, by_column = np.int64(start == "rows"), np.int64(start == "columns")
    lower, upper = shape == "lower", shape == "upper"

    @inline
    def product(a, a_row, a_column, b, o, rows, inner, columns, factors):
        b_row = b.shape[1]
        o_row = o.shape[1]
        for m in range(0, rows, 4):
            skip = m if upper else 0
            count = min(inner, m + 4) if lower else inner - skip
            a_at, b_at = m * a_row + skip * a_column, skip * b_row
            n = 0
            while LANES == 16 and n + 4 * LANES <= columns:  # AVX2 has too few registers for the widest tile
                at = m * by_row + n * by_column
                tile4(a, a_at, a_row, a_column, b, b_at + n, b_row, o, m * o_row + n, o_row, count, factors, at)
                n += 4 * LANES
            while n + 2 * LANES <= columns:
                at = m * by_row + n * by_column
                tile2(a, a_at, a_row, a_column, b, b_at + n, b_row, o, m * o_row + n, o_row, count, factors, at)
                n += 2 * LANES
            while n < columns:
                at = m * by_row + n * by_column
                tile1(a, a_at, a_row, a_column, b, b_at + n, b_row, o, m * o_row + n, o_row, count, factors, at)
                n += LANES

    return product


_zero, _add, _rows, _columns = _product("zero"), _product("add"), _product("rows"), _product("columns")
_lower, _upper = _product("add", "lower"), _product("add", "upper")


@jit_views
def matmul(a, a_row, a_column, b, o, rows, inner, columns):
    """o[:rows, :columns] += A @ b[:inner, :columns], where A[m, j] = a.flat[m * a_row + j * a_column].

    float32, `b` and `o` two-dimensional and contiguous with row lengths that are multiples of LANES; `rows` a multiple
    of 4, `columns` of LANES. `(a, 1, K)` reads a transposed, `(a, K, 1)` plainly. Pad scratch with zeros.
    """
    wide_vectors()
    _add(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_lower(a, a_row, a_column, b, o, rows, inner, columns):
    """As `matmul` for a square A that is zero above its diagonal."""
    wide_vectors()
    _lower(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_upper(a, a_row, a_column, b, o, rows, inner, columns):
    """As `matmul` for a square A that is zero below its diagonal, such as a lower one read transposed."""
    wide_vectors()
    _upper(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_into(a, a_row, a_column, b, o, rows, inner, columns):
    """As `matmul`, but o = A @ b: what stood in o does not matter."""
    wide_vectors()
    _zero(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_rows(a, a_row, a_column, b, o, rows, inner, columns, factors):
    """As `matmul`, but o = factors[:, None] * o + A @ b."""
    wide_vectors()
    _rows(a, a_row, a_column, b, o, rows, inner, columns, factors)


@jit_views
def matmul_columns(a, a_row, a_column, b, o, rows, inner, columns, factors):
    """As `matmul`, but o = factors * o + A @ b."""
    wide_vectors()
    _columns(a, a_row, a_column, b, o, rows, inner, columns, factors)


@intrinsic
def _transpose_block(typing_context, x, x_at, x_row, o, o_at, o_row):
    """LANES x LANES entries of x, transposed into o, by log2(LANES) rounds of register shuffles."""
    signature = types.void(x, types.intp, types.intp, o, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        x_value, x_at, x_row, o_value, o_at, o_row = arguments
        vector, integer = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)

        def pointer(kind, value, at, row, m):
            base = arrayobj.make_array(kind)(context, builder, value).data
            offset = builder.add(at, builder.mul(ir.Constant(integer, m), row))
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        def pick(first, second, lanes):
            return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes))

        lines = [builder.load(pointer(signature.args[0], x_value, x_at, x_row, m), align=4) for m in range(LANES)]
        step = 1
        while step < LANES:
            for i in range(LANES):
                if i & step:
                    continue
                low, high = lines[i], lines[i + step]
                lines[i] = pick(low, high, [LANES + n - step if n & step else n for n in range(LANES)])
                lines[i + step] = pick(low, high, [LANES + n if n & step else n + step for n in range(LANES)])
            step *= 2
        for m, line in enumerate(lines):
            builder.store(line, pointer(signature.args[3], o_value, o_at, o_row, m), align=4)
        return context.get_dummy_value()

    return signature, generate


@jit_views
def transpose(x, rows, columns, o):
    """o[c, m] = x[m, c]; two-dimensional and contiguous, both extents padded to multiples of LANES in memory."""
    wide_vectors()
    x_row, o_row = x.shape[1], o.shape[1]
    for m in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            _transpose_block(x, m * x_row + c, x_row, o, c * o_row + m, o_row)


@jit_views
def clear(x, begin, end):
    """x[begin:end] = 0. (A slice assignment would do, at ten times the compilation.)"""
    for m in range(begin, end):
        row = x[m]
        for c in range(row.shape[0]):
            row[c] = np.float32(0.0)


@jit_views
def copy(x, o, rows, columns):
    """o[:rows, :columns] = x[:rows, :columns]."""
    for m in range(rows):
        source, target = x[m], o[m]
        for c in range(columns):
            target[c] = source[c]
