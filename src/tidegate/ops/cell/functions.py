"""What a cell's equations may call, and the derivatives of it.

They are functions of our own: SymPy's would be simplified by rules that know real numbers, not floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
from sympy import Expr, Function


class where_negative(Function):
    """yes where condition < 0, else no."""

    nargs = 3

    @classmethod
    def eval(cls, condition: Expr, yes: Expr, no: Expr) -> Expr | None:
        if condition.is_Number:
            return yes if condition < 0 else no
        return yes if yes == no else None

    def fdiff(self, argindex: int = 1) -> Expr:
        condition = self.args[0]
        if argindex == 1:
            return sympy.Integer(0)
        return where_negative(condition, *((1, 0) if argindex == 2 else (0, 1)))


class _OfOne(Function):
    """A function of one argument; of a number it is a number."""

    nargs = 1
    of: Callable[[float], float]

    @classmethod
    def eval(cls, x: Expr) -> Expr | None:
        return sympy.Float(cls.of(float(x)), 17) if x.is_Number else None


class sigmoid(_OfOne):
    """1 / (1 + exp(-x))"""

    of = staticmethod(lambda x: 0.5 + 0.5 * math.tanh(0.5 * x))

    def fdiff(self, argindex: int = 1) -> Expr:
        return self * (1 - self)


class tanh(_OfOne):
    of = staticmethod(math.tanh)

    def fdiff(self, argindex: int = 1) -> Expr:
        return 1 - self * self


class exp(_OfOne):
    of = staticmethod(math.exp)

    def fdiff(self, argindex: int = 1) -> Expr:
        return self


class log(_OfOne):
    of = staticmethod(math.log)

    def fdiff(self, argindex: int = 1) -> Expr:
        return 1 / self.args[0]


class sqrt(_OfOne):
    of = staticmethod(math.sqrt)

    def fdiff(self, argindex: int = 1) -> Expr:
        return sympy.Rational(1, 2) / self


class softplus(_OfOne):
    """log(1 + exp(x))"""

    of = staticmethod(lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))))

    def fdiff(self, argindex: int = 1) -> Expr:
        return sigmoid(self.args[0])


# What equations may call, by name: how many arguments, and what it stands for.
FUNCTIONS: dict[str, tuple[int, Any]] = {
    "sigmoid": (1, sigmoid),
    "tanh": (1, tanh),
    "exp": (1, exp),
    "log": (1, log),
    "sqrt": (1, sqrt),
    "softplus": (1, softplus),
    "log_sigmoid": (1, lambda x: -softplus(-x)),
    "relu": (1, lambda x: where_negative(x, 0, x)),
    "abs": (1, lambda x: where_negative(x, -x, x)),
    "maximum": (2, lambda x, y: where_negative(x - y, y, x)),
    "minimum": (2, lambda x, y: where_negative(x - y, x, y)),
    "clip": (3, lambda x, low, high: where_negative(x - low, low, where_negative(high - x, high, x))),
}
