"""What kernels spend their time in, written out in vector instructions: products, triangular systems, transposes.

These, and the elementwise passes of passes.py, work on flat float32 arrays. A matrix is `(array, at, row)`: the index
of its first entry and the distance between rows, so that scratch and one head of a (B, T, H, D) tensor are read and
written alike. Widths need not be multiples of a vector (the last one is masked), and how columns are split among calls
makes no difference to any of them.

LLVM cannot prove that two arrays do not overlap: from loops it makes code that checks, or reads memory again after each
store. Here nothing is left to prove, nor much to optimise, which also keeps the first call short.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from tidegate.ops.kernels import LANES

INTEGER, FLOAT = ir.IntType(64), ir.FloatType()
VECTOR, MASK = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.IntType(1), LANES)
BITS = ir.VectorType(ir.IntType(32), LANES)
NAME = f"v{LANES}f32.p0"
WIDTHS = (4, 2) if LANES == 16 else (2,)  # vectors of a tile beside single ones; AVX2 has too few registers for 4 x 4


# -- instructions ------------------------------------------------------------------------------------------------------
def number(n: int) -> ir.Constant:
    return ir.Constant(INTEGER, n)


def splat(builder, scalar):
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(BITS, [0] * LANES))


def filled(x: float) -> ir.Constant:
    return ir.Constant(VECTOR, [struct.unpack("f", struct.pack("f", x))[0]] * LANES)


def _fused(builder, x, y, z):
    return builder.fadd(z, builder.fmul(x, y, flags=("contract",)), flags=("contract",))


def scalar(builder, base, at):
    return builder.load(builder.gep(base, [at], source_etype=FLOAT), align=4)


def load(builder, base, at, mask=None):
    place = builder.bitcast(builder.gep(base, [at], source_etype=FLOAT), VECTOR.as_pointer())
    if mask is None:
        return builder.load(place, align=4)
    kind = ir.FunctionType(VECTOR, [VECTOR.as_pointer(), ir.IntType(32), MASK, VECTOR])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{NAME}")
    return builder.call(function, [place, ir.Constant(ir.IntType(32), 4), mask, filled(0.0)])


def store(builder, value, base, at, mask=None):
    place = builder.bitcast(builder.gep(base, [at], source_etype=FLOAT), VECTOR.as_pointer())
    if mask is None:
        builder.store(value, place, align=4)
        return
    kind = ir.FunctionType(ir.VoidType(), [VECTOR, VECTOR.as_pointer(), ir.IntType(32), MASK])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{NAME}")
    builder.call(function, [value, place, ir.Constant(ir.IntType(32), 4), mask])


def first_lanes(builder, count):
    """A mask of the lanes below `count`."""
    lanes = ir.Constant(ir.VectorType(INTEGER, LANES), list(range(LANES)))
    undefined = ir.Constant(lanes.type, ir.Undefined)
    first = builder.insert_element(undefined, count, ir.Constant(ir.IntType(32), 0))
    return builder.icmp_signed("<", lanes, builder.shuffle_vector(first, undefined, ir.Constant(BITS, [0] * LANES)))


def _least(builder, x, y):
    return builder.select(builder.icmp_signed("<", x, y), x, y)


@contextmanager
def counting(builder, begin, end, step: int) -> Iterator[Any]:
    """for index in range(begin, end, step), whole steps only."""
    last = builder.sub(end, number(step - 1))
    with cgutils.for_range_slice(builder, begin, last, number(step), INTEGER) as (index, _):
        yield index


def function_of(builder, name: str, arguments: list[Any], body: Callable[..., None]) -> None:
    """Call `body` as a function of its own, of which every kernel has one copy."""
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [x.type for x in arguments]), name)
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        # llvmlite knows the common attributes only; its set accepts any other through the base class.
        set.add(function.attributes, f'"prefer-vector-width"="{LANES * 32}"')
        inside = ir.IRBuilder(function.append_basic_block("entry"))
        body(inside, *function.args)
        inside.ret_void()
    builder.call(function, arguments)


def data(context, builder, kind, value):
    return arrayobj.make_array(kind)(context, builder, value).data


# -- products ----------------------------------------------------------------------------------------------------------
def product(
    start: str = "zero", finish: str = "none", shape: str = "full", keep: str = "all", *, narrow: bool = False
) -> Any:
    """A function o = finish(start(o) + A @ B + A2 @ B2), called as

        f(rows, columns, (o, at, row), (a, at, row, column), (b, at, row), inner, second, (factors, at, row))

    with A[m, j] = a[at + m * row + j * column], and `second` either `()` or `(a2, b2, inner2)` of such tuples.

    `start` of o: "zero", "add", or multiplied by "rows" (entry m of factors). `finish`: "none", multiplied by "rows" or
    by "matrix" (the matrix of factors; a row of 0 makes it one factor per column). `shape` of the last A: "full", or
    square and zero above ("lower") or below ("upper") its diagonal; tiles of zeros are left out. `keep` of the result:
    "all", "lower", "strict" (zero from the diagonal on). `narrow` is faster where columns are one vector.
    """

    @intrinsic
    def run(typing_context, rows, columns, o, a, b, inner, second, factors):
        count = types.intp
        signature = types.void(count, count, o, a, b, count, second, factors)

        def generate(context, builder, signature, arguments):
            def flat(kind, value):
                """A tuple's arrays as pointers, tuples inside it likewise."""
                found = []
                for i, part in enumerate(kind):
                    x = builder.extract_value(value, i)
                    if isinstance(part, types.Array):
                        found.append(data(context, builder, part, x))
                    elif isinstance(part, types.BaseTuple):
                        found += flat(part, x)
                    else:
                        found.append(context.cast(builder, x, part, count))
                return found

            rows, columns, *_ = arguments
            o, a, b, second, factors = (flat(signature.args[i], arguments[i]) for i in (2, 3, 4, 6, 7))
            if not second:  # a product of nothing before or after the only one
                first, second = [*a, *b, number(0)], [*a, *b, arguments[5]]
            else:
                first = [*a, *b, arguments[5]]
            how = [ir.Constant(ir.IntType(1), shape == x) for x in ("lower", "upper")]
            label = f"tidegate.product.{start}.{finish}.{keep}.{narrow}"
            body = _Product(start, finish, keep, narrow)
            function_of(builder, label, [rows, columns, *o, *first, *second, *factors, *how], body)
            return context.get_dummy_value()

        return signature, generate

    return run


class _Product:
    """The body of a product: tiles of many rows, then single rows, each from wide to narrow.

    A tile needs eight sums, as that many multiply-adds are under way at a time.
    """

    def __init__(self, start: str, finish: str, keep: str, narrow: bool):
        self.start, self.finish, self.keep = start, finish, keep
        self.sizes = {8: (), 4: (), 1: ()} if narrow else {4: WIDTHS, 1: WIDTHS[:1]}

    def __call__(self, builder, rows, columns, o, o_at, o_row, *rest):
        pairs, factors = (rest[:8], rest[8:16]), rest[16:19]
        end = number(0)
        for height, widths in self.sizes.items():
            begin, end = end, builder.and_(rows, number(-height))
            with counting(builder, begin, end, height) as m:
                done = number(0)
                for width in widths:
                    size = width * LANES
                    until = builder.and_(columns, number(-size))
                    with counting(builder, done, until, size) as n:
                        self.tile(builder, height, width, None, m, n, (o, o_at, o_row), pairs, factors, rest[19:])
                    done = until
                with cgutils.for_range_slice(builder, done, columns, number(LANES), INTEGER) as (n, _):
                    mask = first_lanes(builder, builder.sub(columns, n))
                    self.tile(builder, height, 1, mask, m, n, (o, o_at, o_row), pairs, factors, rest[19:])

    def tile(self, builder, height, width, mask, m, n, out, pairs, factors, shape):
        o, o_at, o_row = out
        lower, upper = shape
        cells = [(i, j) for i in range(height) for j in range(width)]

        def row(i, at, stride):
            return builder.add(at, builder.mul(builder.add(m, number(i)), stride))

        def places(at, stride):
            starts = [builder.add(row(i, at, stride), n) for i in range(height)]
            return [builder.add(starts[i], number(j * LANES)) for i, j in cells]

        def scaled(sums, kind):
            base, at, stride = factors
            if kind == "rows":
                scales = [splat(builder, scalar(builder, base, row(i, at, number(1)))) for i in range(height)]
                return [builder.fmul(x, scales[i]) for x, (i, _) in zip(sums, cells, strict=True)]
            if kind == "matrix":
                scales = [load(builder, base, place, mask) for place in places(at, stride)]
                return [builder.fmul(x, y) for x, y in zip(sums, scales, strict=True)]
            return sums

        if self.start == "zero":
            sums = [filled(0.0)] * len(cells)
        else:
            sums = scaled([load(builder, o, place, mask) for place in places(o_at, o_row)], self.start)
        for pair in pairs:
            a, a_at, a_row, a_column, b, b_at, b_row, inner = pair
            begin, end = number(0), inner
            if pair is pairs[-1]:
                begin = builder.select(upper, m, begin)
                end = builder.select(lower, _least(builder, inner, builder.add(m, number(height))), inner)
            lines = [builder.gep(a, [row(i, a_at, a_row)], source_etype=FLOAT) for i in range(height)]
            b_at = builder.add(b_at, n)
            sums = self.inner(builder, width, mask, lines, a_column, (b, b_at, b_row), begin, end, sums)
        sums = scaled(sums, self.finish)
        if self.keep != "all":
            for index, (i, j) in enumerate(cells):
                count = builder.sub(builder.add(m, number(i + (self.keep == "lower") - j * LANES)), n)
                sums[index] = builder.select(first_lanes(builder, count), sums[index], filled(0.0))
        for place, value in zip(places(o_at, o_row), sums, strict=True):
            store(builder, value, o, place, mask)

    @staticmethod
    def inner(builder, width, mask, lines, a_column, b, begin, end, initial):
        base, b_at, b_row = b
        before = builder.block
        loop, done = builder.append_basic_block("inner"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", begin, end), loop, done)
        builder.position_at_end(loop)
        j = builder.phi(INTEGER)
        j.add_incoming(begin, before)
        sums = [builder.phi(VECTOR) for _ in initial]
        for total, value in zip(sums, initial, strict=True):
            total.add_incoming(value, before)
        at = builder.add(b_at, builder.mul(j, b_row))
        columns = [load(builder, base, builder.add(at, number(n * LANES)), mask) for n in range(width)]
        offset, new = builder.mul(j, a_column), []
        for i, line in enumerate(lines):
            factor = splat(builder, scalar(builder, line, offset))
            new += [_fused(builder, factor, columns[n], sums[i * width + n]) for n in range(width)]
        following = builder.add(j, number(1))
        builder.cbranch(builder.icmp_signed("<", following, end), loop, done)
        j.add_incoming(following, loop)
        for total, value in zip(sums, new, strict=True):
            total.add_incoming(value, loop)
        builder.position_at_end(done)
        results = []
        for value, other in zip(initial, new, strict=True):
            result = builder.phi(VECTOR)
            result.add_incoming(value, before)
            result.add_incoming(other, loop)
            results.append(result)
        return results


# -- triangular systems ------------------------------------------------------------------------------------------------
def solve(rows: int, *, transposed: bool = False) -> Any:
    """A function y <- (I - A)^-1 y, or (I - A^T)^-1 y, called as f(columns, (y, at, row), (a, at, row)).

    A is strictly lower triangular, with `rows` rows. All rows of a vector of columns are in registers.
    """

    @intrinsic
    def run(typing_context, columns, y, a):
        signature = types.void(types.intp, y, a)

        def generate(context, builder, signature, arguments):
            values = [arguments[0]]
            for kind, value in zip(signature.args[1:], arguments[1:], strict=True):
                values.append(data(context, builder, kind[0], builder.extract_value(value, 0)))
                values += [builder.extract_value(value, 1), builder.extract_value(value, 2)]
            label = f"tidegate.solve.{rows}.{transposed}"
            function_of(builder, label, values, lambda *given: _solve(*given, rows, transposed))
            return context.get_dummy_value()

        return signature, generate

    return run


def _solve(builder, columns, y, y_at, y_row, a, a_at, a_row, rows: int, transposed: bool) -> None:
    with cgutils.for_range_slice(builder, number(0), columns, number(LANES), INTEGER) as (c, _):
        mask = first_lanes(builder, builder.sub(columns, c))
        places = [builder.add(builder.add(y_at, builder.mul(number(m), y_row)), c) for m in range(rows)]
        lines = [load(builder, y, place, mask) for place in places]
        order = range(rows - 1, -1, -1) if transposed else range(rows)
        for j in order:  # row j is known, take it to those after it
            for m in range(j) if transposed else range(j + 1, rows):
                row, column = (j, m) if transposed else (m, j)
                at = builder.add(builder.add(a_at, builder.mul(number(row), a_row)), number(column))
                lines[m] = _fused(builder, splat(builder, scalar(builder, a, at)), lines[j], lines[m])
        for place, line in zip(places, lines, strict=True):
            store(builder, line, y, place, mask)


# -- transposes --------------------------------------------------------------------------------------------------------
@intrinsic
def transpose(typing_context, rows, columns, o, x):
    """o[c, m] = x[m, c], as `transpose(rows, columns, (o, at, row), (x, at, row))`.

    `o` is written in whole blocks of LANES x LANES; what lies beyond `rows` and `columns` there is not defined.
    """
    count = types.intp
    signature = types.void(count, count, o, x)

    def generate(context, builder, signature, arguments):
        parts = list(arguments[:2])
        for kind, value in zip(signature.args[2:], arguments[2:], strict=True):
            parts.append(data(context, builder, kind[0], builder.extract_value(value, 0)))
            parts += [builder.extract_value(value, 1), builder.extract_value(value, 2)]
        function_of(builder, "tidegate.transpose", parts, _transpose)
        return context.get_dummy_value()

    return signature, generate


def _transpose(builder, rows, columns, o, o_at, o_row, x, x_at, x_row):
    last = builder.sub(rows, number(1))

    def pick(first, second, lanes):
        return builder.shuffle_vector(first, second, ir.Constant(BITS, lanes))

    row_loop, column_loop = (
        cgutils.for_range_slice(builder, number(0), end, number(LANES), INTEGER) for end in (rows, columns)
    )
    with row_loop as (m, _), column_loop as (c, _):
        mask = first_lanes(builder, builder.sub(columns, c))
        lines = []
        for i in range(LANES):  # rows that are not there: the last one again
            line = _least(builder, builder.add(m, number(i)), last)
            at = builder.add(builder.add(x_at, builder.mul(line, x_row)), c)
            lines.append(load(builder, x, at, mask))
        step = 1
        while step < LANES:
            for i in range(LANES):
                if i & step:
                    continue
                low, high = lines[i], lines[i + step]
                lines[i] = pick(low, high, [LANES + n - step if n & step else n for n in range(LANES)])
                lines[i + step] = pick(low, high, [LANES + n if n & step else n + step for n in range(LANES)])
            step *= 2
        for i, line in enumerate(lines):
            at = builder.mul(builder.add(c, number(i)), o_row)
            store(builder, line, o, builder.add(builder.add(o_at, at), m))
