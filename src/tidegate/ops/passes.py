"""Elementwise passes over rows and columns, written as Python expressions of vectors. See tiles.py for the operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from tidegate.ops.kernels import LANES
from tidegate.ops.tiles import (
    BITS,
    FLOAT,
    INTEGER,
    VECTOR,
    counting,
    data,
    filled,
    first_lanes,
    function_of,
    load,
    number,
    scalar,
    splat,
    store,
)
from tidegate.ops.vector import LOG1P


# -- prefetching -------------------------------------------------------------------------------------------------------
@intrinsic
def prefetch(typing_context, rows, columns, x):
    """Ask for `prefetch(rows, columns, (x, at, row))` ahead of time; what is not there is no error.

    Rows of one head lie a stride apart, which the machine's own prefetcher does not follow.
    """
    signature = types.void(types.intp, types.intp, x)

    def generate(context, builder, signature, arguments):
        rows, columns, value = arguments
        base = data(context, builder, signature.args[2][0], builder.extract_value(value, 0))
        at, row = builder.extract_value(value, 1), builder.extract_value(value, 2)
        function_of(builder, "tidegate.prefetch", [rows, columns, base, at, row], _prefetch)
        return context.get_dummy_value()

    return signature, generate


def _prefetch(builder, rows, columns, base, at, row):
    byte, small = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, small, small, small])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    steps = ((rows, 1), (columns, 16))  # a cache line
    row_loop, column_loop = (
        cgutils.for_range_slice(builder, number(0), end, number(step), INTEGER) for end, step in steps
    )
    with row_loop as (m, _), column_loop as (c, _):
        place = builder.gep(base, [builder.add(builder.add(at, builder.mul(m, row)), c)], source_etype=FLOAT)
        # to read, into the second-level cache, data
        builder.call(function, [builder.bitcast(place, byte), small(0), small(2), small(1)])


# -- elementwise -------------------------------------------------------------------------------------------------------
class Vector:
    """A vector in an expression: + - * / with vectors and numbers, exponentials, and the functions below the class."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def _make(self, kind: str, x: Any, y: Any) -> Vector:
        x, y = (z.value if isinstance(z, Vector) else filled(z) for z in (x, y))
        return Vector(self.builder, getattr(self.builder, kind)(x, y, flags=("contract",)))

    def __add__(self, other: Any) -> Vector:
        return self._make("fadd", self, other)

    def __sub__(self, other: Any) -> Vector:
        return self._make("fsub", self, other)

    def __mul__(self, other: Any) -> Vector:
        return self._make("fmul", self, other)

    def __truediv__(self, other: Any) -> Vector:
        return self._make("fdiv", self, other)

    def __rsub__(self, other: Any) -> Vector:
        return self._make("fsub", other, self)

    def __rtruediv__(self, other: Any) -> Vector:
        return self._make("fdiv", other, self)

    def __neg__(self) -> Vector:
        return self._make("fsub", 0.0, self)

    __radd__, __rmul__ = __add__, __mul__

    def exp_and_inverse(self) -> tuple[Vector, Vector]:
        """exp(x) and exp(-x) for |x| <= 87: the even and odd parts of their series are the same. Error 2e-7."""
        magic = 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number, which then stands in the last bits
        shifted = self * 1.44269504 + magic
        n = shifted - magic
        r = self - n * 0.693359375 + n * 2.12194440e-4
        s = r * r
        even = ((s * 1.3888889e-3 + 4.1666667e-2) * s + 0.5) * s + 1.0
        odd = ((s * 1.9841270e-4 + 8.3333333e-3) * s + 1.6666667e-1) * s * r + r
        build = self.builder
        power = build.shl(build.bitcast(shifted.value, BITS), ir.Constant(BITS, [23] * LANES))
        one = ir.Constant(BITS, [127 << 23] * LANES)
        up = Vector(build, build.bitcast(build.add(one, power), VECTOR))
        down = Vector(build, build.bitcast(build.sub(one, power), VECTOR))
        return (even + odd) * up, (even - odd) * down

    def exp(self) -> Vector:
        """exp(x) for x <= 0 (up to 88 at most); zero below -87."""
        build, low = self.builder, filled(-87.0)
        above = build.fcmp_unordered(">=", self.value, low)  # NaN passes, and stays
        clamped = Vector(build, build.select(above, self.value, low))
        return Vector(build, build.select(above, clamped.exp_and_inverse()[0].value, filled(0.0)))


# -- functions of vectors ----------------------------------------------------------------------------------------------
def where_negative(x: Vector, yes: Any, no: Any) -> Vector:
    """yes where x < 0, else no (also where x is NaN)."""
    yes, no = (z.value if isinstance(z, Vector) else filled(z) for z in (yes, no))
    return Vector(x.builder, x.builder.select(x.builder.fcmp_ordered("<", x.value, filled(0.0)), yes, no))


def exp(x: Vector) -> Vector:
    """exp(x) for x <= 88, and there it stays; zero below -87."""
    build, high = x.builder, filled(88.0)
    return Vector(build, build.select(build.fcmp_ordered(">", x.value, high), high, x.value)).exp()


def sigmoid(x: Vector) -> Vector:
    """1 / (1 + exp(-x))"""
    e = where_negative(x, x, -x).exp()
    return where_negative(x, e, 1.0) / (1.0 + e)


def tanh(x: Vector) -> Vector:
    """tanh(x), with a relative error of 3e-7 for small x too."""
    size = where_negative(x, -x, x)
    e = (size * -2.0).exp()
    far = (1.0 - e) / (1.0 + e)
    square = x * x  # near zero 1 - e would be the difference of nearly equal numbers
    series = ((square * 0.021869489 - 0.053968254) * square + 0.13333334) * square - 0.33333334
    near = size + size * square * series
    y = where_negative(size - 0.25, near, far)
    return where_negative(x, -y, y)


def softplus(x: Vector) -> Vector:
    """log(1 + exp(x))"""
    e, total = where_negative(x, x, -x).exp(), cast(Any, LOG1P[-1])
    for coefficient in LOG1P[-2::-1]:
        total = e * total + coefficient
    return where_negative(x, 0.0, x) + e * total


def log(x: Vector) -> Vector:
    """log(x) for normal numbers x > 0. Error 1e-7."""
    build, bits = x.builder, x.builder.bitcast(x.value, BITS)
    # x = 2^n m with m in [sqrt(1/2), sqrt(2)): what is taken off the exponent is that of sqrt(1/2).
    shifted = build.sub(bits, ir.Constant(BITS, [0x3F3504F3] * LANES))
    power = build.and_(shifted, ir.Constant(BITS, [-(1 << 23)] * LANES))
    n = Vector(build, build.sitofp(build.ashr(shifted, ir.Constant(BITS, [23] * LANES)), VECTOR))
    r = Vector(build, build.bitcast(build.sub(bits, power), VECTOR)) - 1.0
    series: Any = 7.0376836292e-2
    for coefficient in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1):
        series = r * series + coefficient
    for coefficient in (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1):
        series = r * series + coefficient
    square = r * r
    return n * 0.693359375 + (r + (series * r * square - n * 2.12194440e-4 - square * 0.5))


def sqrt(x: Vector) -> Vector:
    """The square root of x >= 0."""
    kind = ir.FunctionType(VECTOR, [VECTOR])
    function = cgutils.get_or_insert_function(x.builder.module, kind, f"llvm.sqrt.v{LANES}f32")
    return Vector(x.builder, x.builder.call(function, [x.value]))


def elementwise(function: Callable[..., Any], *, carry: bool = False, total: bool = False) -> Any:
    """A pass over rows and columns that computes `function` of Vectors, called as

        f(rows, columns, (output, ...), (input, ...))

    Inputs: matrices `(x, at, row)`, one entry per row `(x, at)`, numbers. A row of 0 reads the same row each time, a
    negative one goes backwards. Outputs: matrices; with `total` the sums of rows, one entry per row `(o, at)`.

    With `carry` the first output `(o, at, 0)` is a row that goes from row to row: it is handed to `function` first, and
    the first result is what it is for the next row.
    """

    @intrinsic
    def run(typing_context, rows, columns, outputs, inputs):
        signature = types.void(types.intp, types.intp, outputs, inputs)

        def generate(context, builder, signature, arguments):
            values, shapes = list(arguments[:2]), []
            for kinds, value in zip(signature.args[2:], arguments[2:], strict=True):
                shape = []
                for i, kind in enumerate(kinds):
                    x = builder.extract_value(value, i)
                    if isinstance(kind, types.BaseTuple):
                        values.append(data(context, builder, kind[0], builder.extract_value(x, 0)))
                        values += [
                            context.cast(builder, builder.extract_value(x, n), kind[n], types.intp)
                            for n in range(1, len(kind))
                        ]
                        shape.append(len(kind))
                    else:
                        values.append(context.cast(builder, x, kind, types.float32))
                        shape.append(1)
                shapes.append(tuple(shape))
            label = f"tidegate.{function.__module__}.{function.__qualname__}.{shapes}.{carry}.{total}".replace(" ", "")
            function_of(builder, label, values, _Pass(function, *shapes, carry, total))
            return context.get_dummy_value()

        return signature, generate

    return run


class _Pass:
    """The body of an elementwise pass; how many values each operand consists of tells its kind."""

    def __init__(self, function, outputs: tuple[int, ...], inputs: tuple[int, ...], carry: bool, total: bool):
        self.function, self.outputs, self.inputs, self.carry, self.total = function, outputs, inputs, carry, total

    def __call__(self, builder, rows, columns, *values):
        parts = iter(values)
        outputs, inputs = ([[next(parts) for _ in range(n)] for n in shape] for shape in (self.outputs, self.inputs))
        whole = builder.and_(columns, number(-LANES))
        tail = builder.and_(columns, number(LANES - 1))
        some = builder.icmp_signed(">", tail, number(0))
        mask = first_lanes(builder, tail)

        @contextmanager
        def every_column() -> Iterator[Callable[[Callable[..., None]], None]]:
            def visit(body):
                with counting(builder, number(0), whole, LANES) as c:
                    body(c, None)
                with builder.if_then(some):
                    body(whole, mask)

            yield visit

        place = cgutils.alloca_once(builder, VECTOR)
        with every_column() as visit:
            if self.carry:
                base, at, _ = outputs[0]

                def down(c, mask):
                    here = builder.add(at, c)
                    builder.store(load(builder, base, here, mask), place)
                    with counting(builder, number(0), rows, 1) as m:
                        first, *others = self.results(builder, inputs, m, c, mask, [builder.load(place)])
                        builder.store(first, place)
                        self.write(builder, outputs[1:], others, m, c, mask)
                    store(builder, builder.load(place), base, here, mask)

                visit(down)
                return
            with counting(builder, number(0), rows, 1) as m:
                if not self.total:
                    visit(lambda c, mask: self.write(
                        builder, outputs, self.results(builder, inputs, m, c, mask), m, c, mask
                    ))  # fmt: skip
                else:
                    builder.store(filled(0.0), place)

                    def add(c, mask):
                        (x,) = self.results(builder, inputs, m, c, mask)
                        builder.store(builder.fadd(builder.load(place), x), place)

                    visit(add)
                    base, at = outputs[0]
                    sums, count = builder.load(place), LANES
                    while count > 1:  # halves onto halves
                        count //= 2
                        lanes = [(n + count) % LANES for n in range(LANES)]
                        moved = builder.shuffle_vector(sums, sums, ir.Constant(BITS, lanes))
                        sums = builder.fadd(sums, moved)
                    result = builder.extract_element(sums, ir.Constant(ir.IntType(32), 0))
                    builder.store(result, builder.gep(base, [builder.add(at, m)], source_etype=FLOAT), align=4)

    def results(self, builder, inputs, m, c, mask, before=()):
        vectors = [Vector(builder, x) for x in before]
        for operand in inputs:
            if len(operand) == 1:
                value = splat(builder, operand[0])
            elif len(operand) == 2:
                value = splat(builder, scalar(builder, operand[0], builder.add(operand[1], m)))
            else:
                base, at, row = operand
                value = load(builder, base, builder.add(builder.add(at, builder.mul(m, row)), c), mask)
            vectors.append(Vector(builder, value))
        found = self.function(*vectors)
        return [
            x.value if isinstance(x, Vector) else filled(x) for x in (found if isinstance(found, tuple) else (found,))
        ]

    @staticmethod
    def write(builder, outputs, values, m, c, mask):
        for (base, at, row), value in zip(outputs, values, strict=True):
            store(builder, value, base, builder.add(builder.add(at, builder.mul(m, row)), c), mask)
