"""A cell's equations: read from text, checked, and put into the order in which they can be computed.

Text becomes a list of steps. A `Let` is elementwise, so every channel can be computed on its own; a `Product` (a
recurrent matrix times a quantity) and a `Mean` (over the channels of a head) need all channels of what they take. So
they cut the steps into levels: everything of one level is one pass over the channels, with products in between.
"""

from __future__ import annotations

import ast
import difflib
import keyword
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import sympy
from sympy import Expr, Symbol

from tidegate.ops.cell.functions import FUNCTIONS, where_negative

_COMPARISONS = {ast.Lt: (1, False), ast.Gt: (-1, False), ast.GtE: (1, True), ast.LtE: (-1, True)}  # sign, exchanged


# -- steps -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Let:
    """symbol = expression, channel by channel."""

    symbol: Symbol
    expression: Expr
    level: int


@dataclass(frozen=True)
class Product:
    """symbol = matrix @ operand, for every head."""

    symbol: Symbol
    matrix: str
    operand: Symbol
    level: int


@dataclass(frozen=True)
class Mean:
    """symbol = the mean of the operands over all of them and over the channels of a head."""

    symbol: Symbol
    operands: tuple[Symbol, ...]
    level: int


Step = Let | Product | Mean


@dataclass(frozen=True)
class Program:
    """What the text says. Names are in the order in which they first appear."""

    states: tuple[str, ...]
    inputs: tuple[str, ...]  # matrices that are applied to x, and "x" itself where it is used as it is
    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    steps: tuple[Step, ...]
    new: tuple[Symbol, ...]  # of the states
    output: Symbol
    levels: int
    lines: dict[Symbol, str] = field(compare=False, default_factory=dict)  # the equation of each quantity

    def old(self, state: str) -> Symbol:
        """The symbol of a state before the step."""
        return Symbol(state)

    @cached_property
    def projected(self) -> frozenset[Symbol]:
        """States, old and new, that are a product and go into products only, with those products: `h = R @ ...`.

        They can have fewer channels than the rest, since no channel of theirs meets one of another quantity.
        """
        found: set[Symbol] = set()
        made = {step.symbol: step.expression for step in self.steps if isinstance(step, Let)}
        products = {step.symbol for step in self.steps if isinstance(step, Product)}
        taken = [s for step in self.steps if not isinstance(step, Product) for s in sources(step)]
        for state, new in zip(self.states, self.new, strict=True):
            product = made[new]
            if product in products and taken.count(product) == 1 and not {new, self.old(state)} & {*taken}:
                found |= {self.old(state), new, product}
        return frozenset(found)


def read(text: str, states: Sequence[str]) -> Program:
    """The program of `text`. Raises ValueError that quotes the equation, with a mark under what is wrong."""
    return _Reader(text, tuple(states)).program()


class _Reader:
    def __init__(self, text: str, states: tuple[str, ...]) -> None:
        self.text, self.states = text, states
        self.now: dict[str, Expr] = {state: Symbol(state) for state in states}  # what a name stands for at this line
        self.kept: set[Expr] = set(self.now.values())
        self.levels: dict[Symbol, int] = {self.now[state]: 0 for state in states}
        self.inputs: dict[str, Symbol] = {}
        self.matrices: dict[str, None] = {}
        self.vectors: dict[str, Symbol] = {}
        self.steps: list[Step] = []
        self.products: dict[tuple[str, Symbol], Symbol] = {}
        self.lines: dict[Symbol, str] = {}
        self.line = ""

    # -- errors --------------------------------------------------------------------------------------------------------
    def error(self, node: ast.AST | None, message: str) -> ValueError:
        def characters(count: int) -> int:  # Python counts bytes
            return len(self.line.encode()[:count].decode(errors="ignore"))

        at = characters(getattr(node, "col_offset", 0))
        width = max(1, characters(getattr(node, "end_col_offset", None) or 0) - at)
        return ValueError(f"equations: {message}\n  {self.line}\n  {' ' * at}{'^' * width}")

    # -- lines ---------------------------------------------------------------------------------------------------------
    def program(self) -> Program:
        self.check_states()
        for number, raw in enumerate(self.text.splitlines(), start=1):
            self.line = raw.split("#")[0].strip()
            if self.line:
                self.equation(number)
        new = tuple(self.now[state] for state in self.states)
        for state, symbol in zip(self.states, new, strict=True):
            if symbol == Symbol(state):
                raise ValueError(f"equations: none gives a new {state!r}; every state needs an equation {state} = ...")
        output = self.now.get("y", new[0])
        self.prune({*new, output})
        used = {s for step in self.steps for s in sources(step)}
        for name, symbol in {**self.inputs, **self.vectors}.items():
            if symbol not in used:
                raise ValueError(f"equations: {name!r} cancels out, nothing depends on it; leave it out")
        return Program(
            self.states,
            tuple(self.inputs),
            tuple(self.matrices),
            tuple(self.vectors),
            tuple(self.steps),
            new,
            output,
            1 + max((step.level for step in self.steps), default=0),
            self.lines,
        )

    def check_states(self) -> None:
        if not self.states:
            raise ValueError("states: seen none, wanted the names of what is remembered, such as 'h c'")
        for number, name in enumerate(self.states):
            if not name.isidentifier() or keyword.iskeyword(name) or name.endswith("_"):
                raise ValueError(f"states: seen {name!r}, wanted names such as h")
            if name in FUNCTIONS or name in ("x", "mean", "where"):
                raise ValueError(f"states: {name!r} has a meaning already; wanted another name")
            if name in self.states[:number]:
                raise ValueError(f"states: seen {name!r} twice")

    def equation(self, number: int) -> None:
        try:
            (statement,) = ast.parse(self.line).body
        except SyntaxError as error:
            place = ast.Pass(col_offset=len(self.line[: (error.offset or 1) - 1].encode()))
            raise self.error(place, f"line {number} does not read: {error.msg}") from None
        except ValueError:
            raise self.error(None, f"line {number} holds more than one equation; wanted one per line") from None
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise self.error(statement, f"line {number} is no equation; wanted name = expression")
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            raise self.error(target, "the left side must be one name")
        name = target.id
        taken = {**FUNCTIONS, **self.inputs, **self.matrices, **self.vectors}
        if name in taken or name in ("x", "mean", "where"):
            raise self.error(target, f"{name!r} has a meaning already and cannot be assigned")
        if name.endswith("_"):
            raise self.error(target, "names do not end in '_', as those of the code that is written do")
        value = self.expression(statement.value)
        if value.is_Number and (name in self.states or name == "y"):
            raise self.error(statement.value, "a state or an output cannot be the same number at all times")
        if value.is_Number:
            self.now[name] = value
            return
        count = sum(str(symbol).split("'")[0] == name for symbol in self.lines)
        symbol = Symbol(name + "'" * (count + 1)) if name in self.states or count else Symbol(name)
        self.now[name] = symbol
        self.let(symbol, value)

    def let(self, symbol: Symbol, value: Expr) -> None:
        level = max((self.levels.get(s, 0) for s in value.free_symbols), default=0)
        self.steps.append(Let(symbol, value, level))
        self.levels[symbol] = level
        self.lines[symbol] = self.line
        self.kept.add(symbol)

    def operand(self, node: ast.AST) -> Symbol:
        """A quantity that is kept whole, an old state or a `Let`: the expression's own symbol, or a new one for it."""
        value = self.expression(node)
        if value.is_Number:
            raise self.error(node, "a number, the same for all channels; wanted something that differs between them")
        if value in self.kept:
            return value
        for step in self.steps:  # the same expression again
            if isinstance(step, Let) and step.expression == value:
                return step.symbol
        symbol = Symbol(f"e#{sum(str(s).startswith('e#') for s in self.levels)}")
        self.let(symbol, value)
        return symbol

    # -- expressions ---------------------------------------------------------------------------------------------------
    def expression(self, node: ast.AST) -> Expr:
        number = node.value if isinstance(node, ast.Constant) else None
        if isinstance(number, int | float) and type(number) is not bool and abs(number) < math.inf:
            return sympy.Integer(number) if isinstance(number, int) else sympy.Float(number, 17)
        if isinstance(node, ast.Name):
            return self.name(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = self.expression(node.operand)
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp):
            return self.operation(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        raise self.error(node, "wanted numbers, names, + - * / ** @ and calls of functions")

    def name(self, node: ast.Name) -> Expr:
        name = node.id
        if name in self.now:
            return self.now[name]
        if name == "x":
            return self.inputs.setdefault("x", Symbol("x"))
        if name in FUNCTIONS or name in ("mean", "where"):
            raise self.error(node, f"{name!r} is a function; wanted {name}(...)")
        if name in self.matrices or (name in self.inputs and name != "x"):
            raise self.error(node, f"{name!r} is a matrix; wanted {name} @ something")
        if name == "y":
            raise self.error(node, "'y', the output, is not known before its equation")
        if name.endswith("_"):
            raise self.error(node, "names do not end in '_', as those of the code that is written do")
        return self.vectors.setdefault(name, Symbol(name))

    def operation(self, node: ast.BinOp) -> Expr:
        if isinstance(node.op, ast.MatMult):
            return self.product(node)
        left, right = self.expression(node.left), self.expression(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            if right == 0:
                raise self.error(node.right, "division by zero")
            return left / right
        if isinstance(node.op, ast.Pow):
            if not (right.is_Integer and 2 <= int(right) <= 8):
                raise self.error(node.right, "wanted a whole power from 2 to 8; others are exp(p * log(...))")
            return left ** int(right)
        raise self.error(node, "wanted + - * / ** @")

    def product(self, node: ast.BinOp) -> Symbol:
        if not isinstance(node.left, ast.Name):
            hint = "; a * U @ h is read as (a * U) @ h, wanted a * (U @ h)" if isinstance(node.left, ast.BinOp) else ""
            raise self.error(node.left, f"the left side of @ is the name of a matrix, such as U{hint}")
        name = node.left.id
        if name in self.now or name in self.vectors or name in FUNCTIONS or name in ("x", "y", "mean", "where"):
            kind = "a vector" if name in self.vectors else "a quantity"
            raise self.error(node.left, f"{name!r} is {kind} already; a matrix needs a name of its own")
        if isinstance(node.right, ast.Name) and node.right.id == "x":
            if name in self.matrices:
                raise self.error(node, f"{name!r} is applied to a state elsewhere; a matrix for x needs its own name")
            return self.inputs.setdefault(name, Symbol(name))
        if name in self.inputs:
            raise self.error(node, f"{name!r} is applied to x elsewhere; a recurrent matrix needs its own name")
        operand = self.operand(node.right)
        if name in self.matrices:
            if (name, operand) in self.products:
                return self.products[name, operand]
            raise self.error(node, f"{name!r} is applied to something else before; give each product its own matrix")
        self.matrices[name] = None
        symbol = Symbol(f"{name}@{operand}")
        old = operand in {Symbol(state) for state in self.states}
        level = 0 if old else self.levels[operand] + 1
        self.steps.append(Product(symbol, name, operand, level))
        self.levels[symbol] = level
        self.products[name, operand] = symbol
        return symbol

    def call(self, node: ast.Call) -> Expr:
        if not isinstance(node.func, ast.Name) or node.keywords:
            raise self.error(node, "wanted a call such as tanh(a)")
        name = node.func.id
        if name == "where":
            return self.where(node)
        if name == "mean":
            if not node.args:
                raise self.error(node, "mean takes at least one quantity")
            operands = tuple(self.operand(argument) for argument in node.args)
            level = max(self.levels.get(s, 0) for s in operands) + 1
            symbol = Symbol(f"mean#{sum(isinstance(step, Mean) for step in self.steps)}")
            self.steps.append(Mean(symbol, operands, level))
            self.levels[symbol] = level
            return symbol
        if name not in FUNCTIONS:
            near = difflib.get_close_matches(name, [*FUNCTIONS, "where", "mean"], 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            known = ", ".join([*FUNCTIONS, "where", "mean"])
            raise self.error(node.func, f"there is no function {name!r}{hint} (there are {known})")
        count, function = FUNCTIONS[name]
        if len(node.args) != count:
            raise self.error(node, f"{name} takes {count} argument{'s' * (count > 1)}, seen {len(node.args)}")
        arguments = [self.expression(argument) for argument in node.args]
        try:
            return function(*arguments)
        except (ValueError, OverflowError):
            raise self.error(node, "no such number") from None

    def where(self, node: ast.Call) -> Expr:
        condition = node.args[0] if len(node.args) == 3 else None
        if not isinstance(condition, ast.Compare) or len(condition.ops) != 1:
            raise self.error(node, "wanted where(a < b, value, other), with one comparison")
        rule = _COMPARISONS.get(type(condition.ops[0]))
        if rule is None:
            raise self.error(condition, "wanted one of < <= > >=")
        sign, exchanged = rule
        difference = sign * (self.expression(condition.left) - self.expression(condition.comparators[0]))
        yes, no = self.expression(node.args[1]), self.expression(node.args[2])
        return where_negative(difference, no, yes) if exchanged else where_negative(difference, yes, no)

    # -- what is not needed --------------------------------------------------------------------------------------------
    def prune(self, wanted: set[Symbol]) -> None:
        """Leave out what neither a state nor the output depends on; an unused name is more likely a mistake."""
        needed = set(wanted)
        for step in reversed(self.steps):
            if step.symbol in needed:
                needed |= sources(step)
        for step in self.steps:
            if step.symbol not in needed:
                self.line = self.lines.get(step.symbol, str(step.symbol))
                raise self.error(None, "nothing depends on this")


def sources(step: Step) -> set[Symbol]:
    """The symbols a step is computed from."""
    if isinstance(step, Let):
        return set(step.expression.free_symbols)
    return {step.operand} if isinstance(step, Product) else set(step.operands)
