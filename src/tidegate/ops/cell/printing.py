"""A cell's expressions as Python text."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

from sympy import Expr, Symbol

from tidegate.ops.cell.functions import FUNCTIONS

_RESERVED = {*FUNCTIONS, "where_negative", "product", "full", "share", "step"}
_RESERVED |= {"inputs", "matrices", "vectors", "states"}
_DERIVED = re.compile(r"(d|flow)_.*|.*_new|.*_of_.*|(e|t|mean)\d+")  # names of the code's own


def identifier(symbol: Symbol | str) -> str:
    """A Python name for a symbol: h' is h_new, U @ h is U_of_h, the gradient of i is d_i.

    A name of the equations that is not free to be used has an underscore behind it, which none there has itself.
    """
    name = str(symbol)
    kind, _, of = name.rpartition(" ")
    if kind:
        return f"{kind}_{identifier(of)}"
    matrix, _, operand = name.rpartition("@")
    if matrix:
        return f"{matrix}_of_{identifier(operand)}"
    own = name.rstrip("'")
    if "#" in own:
        return own.replace("#", "") + "_new" * (len(name) - len(own))
    taken = keyword.iskeyword(own) or own in _RESERVED or _DERIVED.fullmatch(own)
    return own + "_" * bool(taken) + "_new" * (len(name) - len(own))


def emit(expression: Expr) -> str:
    """An expression as Python, of + - * / and calls alone."""
    if isinstance(expression, Symbol):
        return identifier(expression)
    if expression.is_Number:
        value = float(expression)
        return f"{value!r}" if value >= 0 else f"({value!r})"
    if expression.is_Add:
        text = ""
        for term in sorted(expression.args, key=lambda term: (term.is_Number is not True, _negative(term), str(term))):
            if not text:
                text = emit(term)
            else:
                text += f" - {emit(-term)}" if _negative(term) else f" + {emit(term)}"
        return text
    if expression.is_Mul:
        over = [factor for factor in expression.args if factor.is_Pow and factor.exp.is_negative]
        above = [factor for factor in expression.args if factor not in over]
        minus = bool(above) and above[0] == -1
        text = " * ".join(map(_factor, above[1:] if minus else above)) or "1.0"
        for factor in over:
            text += f" / {_factor(1 / factor)}"
        return f"-{text}" if minus else text
    if expression.is_Pow:
        base, power = expression.args
        if int(power) < 0:
            return f"1.0 / {_factor(1 / expression)}"
        return " * ".join([_factor(base)] * int(power))
    return f"{type(expression).__name__}({', '.join(map(emit, expression.args))})"


def _negative(term: Expr) -> bool:
    return bool(term.is_Mul and term.args[0].is_Number and term.args[0] < 0)


def _factor(expression: Expr) -> str:
    text = emit(expression)
    simple = isinstance(expression, Symbol) or expression.is_Function or expression.is_Number
    return text if simple else f"({text})"


def assignments(lets: Iterable[tuple[Symbol, Expr]], indent: str = "    ") -> str:
    return "".join(f"{indent}{identifier(symbol)} = {emit(expression)}\n" for symbol, expression in lets)
