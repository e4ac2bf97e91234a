"""From a cell's program to passes over its channels, forward and backward.

A pass is elementwise: it loads some quantities, computes, and stores others. Between passes stand the products with
recurrent matrices and the means. What a product or mean takes is kept in memory, and a gate whose derivative follows
from itself takes the place of the product it came from, which nobody needs then. Everything else is computed again
where it is needed, which costs less than storing it.

Backward, pass by pass from the last level to the first: every root of a level (a new state, the output, a kept
quantity) has a gradient by then, which is taken through all elementwise steps down to what is kept in memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import sympy
from sympy import Expr, Symbol

from tidegate.ops.cell.equations import Let, Mean, Product, Program, sources


@dataclass(frozen=True)
class Pass:
    """`lets` in order, then the `results`: for each target the expression to store there."""

    lets: tuple[tuple[Symbol, Expr], ...]
    results: tuple[tuple[Symbol, Expr], ...]


def gradient(symbol: Symbol) -> Symbol:
    """The symbol of a quantity's gradient."""
    return Symbol(f"d {symbol}")


def kept(program: Program) -> tuple[Symbol, ...]:
    """The elementwise quantities that a product or a mean takes, in order; old states and products are kept anyway."""
    taken = {step.operand for step in program.steps if isinstance(step, Product)}
    taken |= {symbol for step in program.steps if isinstance(step, Mean) for symbol in step.operands}
    return tuple(step.symbol for step in program.steps if isinstance(step, Let) and step.symbol in taken)


def products(program: Program) -> list[list[Product]]:
    """The products in groups of one operand, by level: each group is one matrix multiplication.

    One that may have fewer channels is a group of its own.
    """
    groups: dict[tuple[int, Symbol, Symbol | None], list[Product]] = {}
    for step in program.steps:
        if isinstance(step, Product):
            alone = step.symbol if step.symbol in program.projected else None
            groups.setdefault((step.level, step.operand, alone), []).append(step)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def means(program: Program) -> list[Mean]:
    return [step for step in program.steps if isinstance(step, Mean)]


def roots(program: Program, level: int) -> list[Symbol]:
    """What a pass of that level computes for good: kept quantities, new states, the output."""
    by_symbol = {step.symbol: step for step in program.steps}
    wanted = dict.fromkeys([*kept(program), *program.new, program.output])
    return [symbol for symbol in wanted if by_symbol[symbol].level == level]


def in_place(program: Program) -> dict[Symbol, Symbol]:
    """Elementwise quantities that are stored over a product: i = sigmoid(a + U @ h), for which di = i * (1 - i) * da.

    Such a product goes nowhere else, so that backward neither reads what the quantity was computed from nor computes it
    again. It has to be of one pass alone: others would not know what is there.
    """
    passes = [{let.symbol for let in _closure(program, roots(program, level))} for level in range(program.levels)]
    memory, curved, uses = set(kept(program)), set[Symbol](), Counter[Symbol]()  # curved: their own slopes need them
    for step in program.steps:
        uses.update(sources(step))
    place = {step.symbol: step.symbol for step in program.steps if isinstance(step, Product)}
    for step in program.steps:
        if not isinstance(step, Let) or isinstance(step.expression, Symbol) or step.symbol in memory:
            continue
        if sum(step.symbol in lets for lets in passes) != 1:
            continue
        needed = {s for slope in _slopes(step).values() for s in slope.free_symbols}
        free = [s for s in sorted(sources(step), key=str) if s in place and uses[s] == 1 and s not in needed | curved]
        if free:
            place[step.symbol] = place.pop(free[0])
        curved |= {step.symbol} & needed
    return {symbol: product for symbol, product in place.items() if symbol != product}


def _slopes(let: Let) -> dict[Symbol, Expr]:
    """The derivative by each source, by the quantity itself where it can be."""
    own = {let.expression: let.symbol}
    return {s: sympy.diff(let.expression, s).xreplace(own) for s in sorted(let.expression.free_symbols, key=str)}


def forward(program: Program, level: int) -> Pass:
    """The pass that computes the roots of a level, and what is stored in place on the way."""
    here = roots(program, level)
    lets, there = _closure(program, here), in_place(program)
    stored = [let.symbol for let in lets if let.symbol in there]
    return shared(lets, [(symbol, symbol) for symbol in dict.fromkeys([*here, *stored])])


def backward(program: Program, level: int) -> Pass:
    """The pass that takes the gradients of a level's roots to everything kept in memory that they depend on."""
    here = roots(program, level)
    lets = _closure(program, here)
    inside = {let.symbol for let in lets}
    flows: dict[Symbol, Expr] = {symbol: gradient(symbol) for symbol in here}
    backwards: list[tuple[Symbol, Expr]] = []
    for let in reversed(lets):
        if let.symbol not in flows:
            continue
        flow = flows[let.symbol]
        if not isinstance(flow, Symbol):
            name = Symbol(f"flow {let.symbol}")
            backwards.append((name, flow))
            flow = name
        for source, slope in _slopes(let).items():
            flows[source] = flows.get(source, sympy.Integer(0)) + flow * slope
    results = [(gradient(s), flow) for s, flow in flows.items() if s not in inside and flow != 0]
    there = in_place(program)
    return shared([let for let in lets if let.symbol not in there], results, backwards)


def _closure(program: Program, here: list[Symbol]) -> list[Let]:
    """The elementwise steps that `here` needs, down to what is kept in memory."""
    memory = set(kept(program))
    needed, lets = set(here), []
    for step in reversed(program.steps):
        if isinstance(step, Let) and step.symbol in needed and (step.symbol in here or step.symbol not in memory):
            lets.append(step)
            needed |= step.expression.free_symbols
    return lets[::-1]


def shared(lets: list[Let], results: list[tuple[Symbol, Expr]], more: list[tuple[Symbol, Expr]] | None = None) -> Pass:
    """One list of assignments in which every subexpression is computed once, in an order that works."""
    named = [(let.symbol, let.expression) for let in lets] + (more or [])
    expressions = [expression for _, expression in [*named, *results]]
    # A quantity's own symbol stands for its expression, so that what the derivatives repeat of it is found.
    own = {expression: symbol for symbol, expression in named if not isinstance(expression, Symbol)}
    expressions = [e if own.get(e) is None or i < len(named) else own[e] for i, e in enumerate(expressions)]
    fresh = sympy.numbered_symbols("t#")
    common, reduced = sympy.cse(expressions, symbols=fresh, order="none")
    assignments = dict(common) | dict(zip((symbol for symbol, _ in named), reduced, strict=False))
    stored = list(zip((target for target, _ in results), reduced[len(named) :], strict=True))
    order: dict[Symbol, Expr] = {}

    def visit(expression: Expr) -> None:
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol in assignments and symbol not in order:
                visit(assignments[symbol])
                order[symbol] = assignments[symbol]

    for _, expression in stored:
        visit(expression)
    return Pass(tuple(order.items()), tuple(stored))


def loads(done: Pass) -> set[Symbol]:
    """What a pass reads from memory."""
    assigned = {symbol for symbol, _ in done.lets}
    read = {s for _, e in [*done.lets, *done.results] for s in e.free_symbols}
    return read - assigned
