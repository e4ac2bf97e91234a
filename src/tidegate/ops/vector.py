"""One vector register of float32 as a value inside a kernel: `h = exp2(step * a) * h + u * splat(b, at)`.

For kernels that carry several vectors from token to token. LLVM keeps such values in registers; rows of scratch arrays
it would write to memory at every step, because it cannot prove that they do not overlap. Arrays are contiguous and
float32, `at` is an index into them laid flat. A function that handles vectors begins with `wide_vectors()`, and passes
them to others only if those are `inline`.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from numba.np import arrayobj

from tidegate.ops.kernels import LANES, inline

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_CONTRACT = ("contract",)  # a * b + c in one rounding, but nothing reordered: exp2's rounding trick must survive


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(f"Vector{LANES}")


vector = _Vector()


@register_model(_Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


def _operator(function, instruction):
    infer_global(function)(type("_Types", (ConcreteTemplate,), {"cases": [signature(vector, vector, vector)]}))

    @lower_builtin(function, vector, vector)
    def _lower(context, builder, signature, arguments):
        return getattr(builder, instruction)(*arguments, flags=_CONTRACT)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def _constant(value, kind=_FLOATS):
    return ir.Constant(kind, [value] * LANES)


def _horner(builder, x, coefficients):
    """coefficients[0] + x (coefficients[1] + x (...))"""
    total = _constant(coefficients[-1])
    for c in coefficients[-2::-1]:
        total = builder.fadd(builder.fmul(total, x, flags=_CONTRACT), _constant(c), flags=_CONTRACT)
    return total


def _element(context, builder, kind, array, at):
    return builder.gep(arrayobj.make_array(kind)(context, builder, array).data, [at])


# -- memory ------------------------------------------------------------------------------------------------------------
@intrinsic
def load(typing_context, array, at):
    """The LANES numbers from `at` on."""

    def generate(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(place, _FLOATS.as_pointer()), align=4)

    return vector(array, types.intp), generate


@intrinsic
def store(typing_context, array, at, value):
    """Write LANES numbers from `at` on."""

    def generate(context, builder, signature, arguments):
        array, at, value = arguments
        place = _element(context, builder, signature.args[0], array, at)
        builder.store(value, builder.bitcast(place, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def _mask(builder, count):
    lanes = ir.Constant(_INTEGERS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(count, ir.IntType(32)), _INTEGERS))


def _spread(builder, scalar, kind):
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), _constant(0, _INTEGERS))


def _masked(builder, name, returns, takes):
    name = f"llvm.masked.{name}.v{LANES}f32.p0"
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(returns, takes), name)


_FLAGS = ir.VectorType(ir.IntType(1), LANES)
_ALIGNMENT = ir.Constant(ir.IntType(32), 4)


@intrinsic
def load_some(typing_context, array, at, count):
    """The `count` numbers from `at` on, zeros behind them."""

    def generate(context, builder, signature, arguments):
        array, at, count = arguments
        place = _element(context, builder, signature.args[0], array, at)
        place = builder.bitcast(place, _FLOATS.as_pointer())
        function = _masked(builder, "load", _FLOATS, [place.type, ir.IntType(32), _FLAGS, _FLOATS])
        return builder.call(function, [place, _ALIGNMENT, _mask(builder, count), _constant(0.0)])

    return vector(array, types.intp, types.intp), generate


@intrinsic
def store_some(typing_context, array, at, value, count):
    """Write the first `count` numbers from `at` on."""

    def generate(context, builder, signature, arguments):
        array, at, value, count = arguments
        place = _element(context, builder, signature.args[0], array, at)
        place = builder.bitcast(place, _FLOATS.as_pointer())
        function = _masked(builder, "store", ir.VoidType(), [_FLOATS, place.type, ir.IntType(32), _FLAGS])
        builder.call(function, [value, place, _ALIGNMENT, _mask(builder, count)])
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp), generate


@intrinsic
def splat(typing_context, array, at):
    """The one number at `at` in every lane."""

    def generate(context, builder, signature, arguments):
        scalar = builder.load(_element(context, builder, signature.args[0], *arguments), align=4)
        return _spread(builder, scalar, _FLOATS)

    return vector(array, types.intp), generate


@intrinsic
def fill(typing_context, number):
    """A float32 in every lane."""

    def generate(context, builder, signature, arguments):
        return _spread(builder, arguments[0], _FLOATS)

    return vector(types.float32), generate


# -- elementwise -------------------------------------------------------------------------------------------------------
@intrinsic
def absolute(typing_context, x):
    """|x|"""

    def generate(context, builder, signature, arguments):
        bits = builder.and_(builder.bitcast(arguments[0], _INTEGERS), _constant(0x7FFFFFFF, _INTEGERS))
        return builder.bitcast(bits, _FLOATS)

    return vector(vector), generate


@intrinsic
def where_negative(typing_context, x, yes, no):
    """yes where x < 0, else no (also where x is NaN)."""

    def generate(context, builder, signature, arguments):
        x, yes, no = arguments
        return builder.select(builder.fcmp_ordered("<", x, _constant(0.0)), yes, no)

    return vector(vector, vector, vector), generate


# 2^f on [-1/2, 1/2], exactly 1 at 0, and log(1 + e) / e on [0, 1]; interpolated in Chebyshev points.
_EXP2 = [1.0, 0.6931471824645996, 0.24022650718688965, 0.055503569543361664, 0.009618056938052177]
_EXP2 += [0.0013390866806730628, 0.00015461447765119374]
LOG1P = [1.0, -0.4999990463256836, 0.33330005407333374, -0.24954558908939362, 0.19678117334842682]
LOG1P += [-0.15311862528324127, 0.10614264756441116, -0.057064201682806015, 0.019907161593437195]
LOG1P += [-0.003256378462538123]
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer, which then stands in the last bits


def _round(builder, x):
    """x rounded to an integer, and 2 to the power of that as bits to be added to a float's."""
    shifted = builder.fadd(x, _constant(_MAGIC), flags=_CONTRACT)
    exponent = builder.shl(builder.bitcast(shifted, _INTEGERS), _constant(23, _INTEGERS))
    return builder.fsub(shifted, _constant(_MAGIC), flags=_CONTRACT), exponent


def _at_least(builder, low, x):
    low = _constant(low)
    return builder.select(builder.fcmp_ordered("<", x, low, flags=_CONTRACT), low, x)  # NaN stays


def _power(builder, f, exponent):
    power = builder.bitcast(_horner(builder, f, _EXP2), _INTEGERS)
    return builder.bitcast(builder.add(power, exponent), _FLOATS)


@intrinsic
def exp2(typing_context, x):
    """2^x for x <= 127; 0 below -127. NaN stays NaN. Relative error 1e-7."""

    def generate(context, builder, signature, arguments):
        x = _at_least(builder, -127.0, arguments[0])
        n, exponent = _round(builder, x)
        return _power(builder, builder.fsub(x, n, flags=_CONTRACT), exponent)

    return vector(vector), generate


@intrinsic
def exp(typing_context, x):
    """exp(x) for x <= 88; 1.6e-38 below -87. NaN stays NaN. Relative error 1.5e-7."""

    def generate(context, builder, signature, arguments):
        def product(y, number):
            return builder.fmul(y, _constant(number), flags=_CONTRACT)

        x = _at_least(builder, -87.0, arguments[0])
        n, exponent = _round(builder, product(x, 1.4426950408889634))
        r = builder.fsub(x, product(n, 0.693359375), flags=_CONTRACT)  # n log 2, in two parts
        r = builder.fadd(r, product(n, 2.1219444006e-4), flags=_CONTRACT)
        return _power(builder, product(r, 1.4426950408889634), exponent)

    return vector(vector), generate


@intrinsic
def log1p(typing_context, x):
    """log(1 + x) for 0 <= x <= 1. Relative error 1e-7."""

    def generate(context, builder, signature, arguments):
        return builder.fmul(arguments[0], _horner(builder, arguments[0], LOG1P), flags=_CONTRACT)

    return vector(vector), generate


@intrinsic
def total(typing_context, x):
    """The sum of the lanes, always in the same order."""

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        width = LANES
        while width > 1:  # the upper half onto the lower
            width //= 2
            upper = ir.Constant(_INTEGERS, [(lane + width) % LANES for lane in range(LANES)])
            x = builder.fadd(x, builder.shuffle_vector(x, x, upper), flags=_CONTRACT)
        return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

    return types.float32(vector), generate


@inline
def sigmoid(x):
    """1 / (1 + exp(-x))"""
    one, e = fill(np.float32(1.0)), exp(fill(np.float32(0.0)) - absolute(x))
    return where_negative(x, e, one) / (one + e)


@inline
def softplus(x):
    """log(1 + exp(x))"""
    zero = fill(np.float32(0.0))
    return where_negative(x, zero, x) + log1p(exp(zero - absolute(x)))
