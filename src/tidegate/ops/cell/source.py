"""A cell's program as Python source: a step in PyTorch, and kernels over all of time.

The text is meant to be read (`tidegate show lstm --source`): one function of a few lines per pass, and around them the
loops over time, in which only the calls and the places of their operands differ from cell to cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from sympy import Expr, Symbol

from tidegate.ops.cell import derivatives
from tidegate.ops.cell.derivatives import Pass, gradient
from tidegate.ops.cell.equations import Let, Mean, Product, Program, sources
from tidegate.ops.cell.printing import assignments, emit, identifier
from tidegate.ops.cell.templates import BACKWARD, FORWARD, HEAD, PLACES, ROWS


# -- PyTorch -----------------------------------------------------------------------------------------------------------
def torch_step(program: Program) -> str:
    """One token: `output, states = step(inputs, matrices, vectors, states)`, tuples of (B, H, d) and (H, d, d)."""

    def unpack(names: Iterable[str], what: str) -> str:
        listed = [identifier(name) for name in names]
        return f"    {', '.join(listed)}, = {what}\n" if listed else ""

    lines = "def step(inputs, matrices, vectors, states):\n"
    lines += unpack(program.inputs, "inputs") + unpack(program.matrices, "matrices")
    lines += unpack(program.vectors, "vectors") + unpack(program.states, "states")
    roots = {root for level in range(program.levels) for root in derivatives.roots(program, level)}
    whole = {Symbol(name) for name in (*program.inputs, *program.states)}  # what has a number for every row and channel
    for step in program.steps:
        name = identifier(step.symbol)
        if isinstance(step, Product) or not whole.isdisjoint(sources(step) if isinstance(step, Let) else ()):
            whole.add(step.symbol)
        if isinstance(step, Let):
            value = emit(step.expression)
            if step.symbol in roots and step.symbol not in whole:
                value = f"full({value}, {identifier(program.states[0])})"
                whole.add(step.symbol)
            lines += f"    {name} = {value}\n"
        elif isinstance(step, Product):
            lines += f"    {name} = product({identifier(step.matrix)}, {identifier(step.operand)})\n"
        else:
            lines += f"    {name} = mean({', '.join(identifier(symbol) for symbol in step.operands)})\n"
    new = ", ".join(identifier(symbol) for symbol in program.new)
    return lines + f"    return {identifier(program.output)}, ({new},)\n"


# -- kernels -----------------------------------------------------------------------------------------------------------
class Kernels:
    """The source of `forward` and `backward` for a program; the arrays they work on are described in numba_cpu.py."""

    def __init__(self, program: Program, equations: str) -> None:
        self.program, self.equations = program, equations
        self.groups = derivatives.products(program)
        self.matrices = [product for group in self.groups for product in group]  # in the order of memory
        self.kept, self.means = derivatives.kept(program), derivatives.means(program)
        self.in_place = derivatives.in_place(program)
        self.sizes = {
            "S": len(program.states),
            "G": len(program.inputs),
            "M": len(self.matrices),
            "E": len(self.kept),
            "Q": len(self.means),
            "V": len(program.vectors),
        }
        self.places = self._places()
        self.written: set[Symbol] = set()  # gradients that hold something already, within a step
        self.passes: list[str] = []

    @cached_property
    def same(self) -> dict[str, str]:
        """Inputs and vectors whose gradient is, for every token, that of a product."""
        results = [dict(derivatives.backward(self.program, k).results) for k in range(self.program.levels)]

        def flows(name: Symbol) -> list[tuple[int, Expr]]:
            return [(k, found[gradient(name)]) for k, found in enumerate(results) if gradient(name) in found]

        averaged = {symbol for mean in self.means for symbol in mean.operands}
        of_products = {str(flows(p.symbol)): p.matrix for p in reversed(self.matrices) if p.symbol not in averaged}
        names = [*self.program.inputs, *self.program.vectors]
        return {name: of_products[key] for name in names if (key := str(flows(Symbol(name)))) in of_products}

    def source(self) -> str:
        forward = "".join(self._forward_level(level) for level in range(self.program.levels))
        backward = "".join(self._backward_level(level) for level in reversed(range(self.program.levels)))
        # What a step's passes add to before anything was stored there begins at zero.
        weights = "".join(f"u{g}, " for g in range(len(self.groups)))
        indented = "\n".join("    " + line.strip() for line in self.equations.strip().splitlines())
        text = HEAD.format(equations=indented) + "".join(self.passes)
        places = "".join(f"            {line}\n" for line in self._begins())
        sizes = {**self.sizes, "SD": times(self.sizes["S"], "D"), "SS": 2 * self.sizes["S"], "Q1": self.sizes["Q"] + 1}
        text += FORWARD.format(weights=weights, places=places, steps=forward, **sizes)
        text += BACKWARD.format(weights=weights, places=places, steps=backward, **sizes)
        kept = ["e" if group[0].operand in self.kept else "scratch" for group in self.groups]
        text += _helper("forward", "p, e, " + weights, [f"p, {operand}" for operand in kept])
        return text + "\n\n" + _helper("backward", "dp, " + weights, ["scratch, dp"] * len(kept))

    def _begins(self) -> list[str]:
        units = {"M": "d", "Q": "B"}
        lines = [
            line.format(n=times(self.sizes[size], units.get(size, "D")))
            for size, line in PLACES.items()
            if self.sizes[size]
        ]
        return [*lines, "at_y, row_y = (b * T + t) * D + head * d, T * D"]

    # -- where things are ----------------------------------------------------------------------------------------------
    def _places(self) -> dict[Symbol, str]:
        """The operand of each quantity in memory: (array, index of row r, distance of rows)."""
        program, places = self.program, {}
        for g, name in enumerate(program.inputs):
            places[Symbol(name)] = f"(x, {after('x_r', g, 'D')}, row_x)"
            places[gradient(Symbol(name))] = f"(dx, {after('x_r', g, 'D')}, row_x)"
        for m, product in enumerate(self.matrices):
            places[product.symbol] = f"(p, {after('p_r', m, 'd')}, row_p)"
            places[gradient(product.symbol)] = f"(dp, {after('p_r', m, 'd')}, row_p)"
        for s, name in enumerate(program.states):
            places[program.old(name)] = f"(old, {after('s_r', s, 'D')}, row_s)"
            places[gradient(program.old(name))] = f"(scratch, {after('before', s, 'R * w')} + w_r, w)"
        for i, name in enumerate(program.vectors):
            places[Symbol(name)] = f"(v, {after('head * d', i, 'D')}, 0)"
            places[gradient(Symbol(name))] = f"(scratch, {after('sums', i, 'w')}, 0)"
        for k, symbol in enumerate(self.kept):
            places[symbol] = f"(e, {after('e_r', k, 'D')}, row_e)"
            places[gradient(symbol)] = f"(scratch, {after('de', k, 'R * w')} + w_r, w)"
        for q, mean in enumerate(self.means):
            places[mean.symbol] = f"(mu, {after('at_m', q, 'B')} + r)"
        return places | {symbol: places[product] for symbol, product in self.in_place.items()}

    def _function(self, name: str, done: Pass, loads: Mapping[Symbol, str], extra: Mapping[str, str] = {}) -> str:
        """Write a pass as a function; gives its call's inputs as text."""
        arguments = [*(identifier(symbol) for symbol in loads), *extra]
        body = f"def _{name}({', '.join(arguments)}):\n" + assignments(done.lets)
        results = ", ".join(emit(expression) for _, expression in done.results)
        self.passes.append(body + f"    return {results}\n\n\n")
        return ", ".join([*loads.values(), *extra.values()]) + ","

    # -- forward -------------------------------------------------------------------------------------------------------
    def _forward_level(self, level: int) -> str:
        program, text = self.program, ""
        for q, mean in enumerate(self.means):
            if mean.level == level:
                loads = {symbol: self.places[symbol] for symbol in dict.fromkeys(mean.operands)}
                share = " + ".join(identifier(symbol) for symbol in mean.operands)
                self.passes.append(
                    f"def _mean_{q}({', '.join(map(identifier, loads))}, share):\n    return ({share}) * share\n\n\n"
                    f"mean_{q} = elementwise(_mean_{q}, total=True)\n\n\n"
                )
                operands = ", ".join(map(all_rows, loads.values()))
                text += (
                    f"            mean_{q}(rows, d, ((mu, {after('at_m', q, 'B')}),), ({operands}, {weight(mean)}))\n"
                )
        first = 0
        for g, group in enumerate(self.groups):
            if group[0].level == level:
                if group[0].operand in self.kept:
                    k = self.kept.index(group[0].operand)
                    operand = f"e, {after('at_e', k, 'D')}, row_e"
                else:
                    operand = f"scratch, {times(self._state(group[0].operand), 'R * w')}, w"
                product = f"p, {after('at_p', first, 'd')}, row_p, {operand}, u{g}, head, {self._taken(group)}"
                text += f"            multiply(board, {g}, rows, {self._given(group)}, {product}, False)\n"
            first += len(group)
        done = derivatives.forward(program, level)
        if not done.results:
            return text
        loads = {symbol: self.places[symbol] for symbol in sorted(derivatives.loads(done), key=str)}
        results, targets = [], []
        for symbol, expression in done.results:
            for target in self._targets(symbol):
                results.append((symbol, expression))
                targets.append(target)
        inputs = self._function(f"forward_{level}", Pass(done.lets, tuple(results)), loads)
        self.passes.append(f"forward_{level} = elementwise(_forward_{level})\n\n\n")
        call = f"                    forward_{level}(n, d, ({', '.join(targets)},), ({inputs}))\n"
        return text + _rows(call)

    def _targets(self, symbol: Symbol) -> list[str]:
        """Where a root is stored: new states in the scratch, which has been saved."""
        states = [s for s, new in enumerate(self.program.new) if new == symbol]
        targets = [f"(scratch, {after('w_r', s, 'R * w')}, w)" for s in states]
        if symbol == self.program.output:
            targets.append("(y, y_r, row_y)")
        if symbol in self.kept or symbol in self.in_place:
            targets.append(self.places[symbol])
        return targets

    def _taken(self, group: list[Product]) -> str:
        """The channels of a head that a group's products take."""
        return "narrow" if group[0].operand in self.program.projected else "d"

    def _given(self, group: list[Product]) -> str:
        """The channels of a head that they give."""
        return "narrow" if group[0].symbol in self.program.projected else times(len(group), "d")

    def _state(self, symbol: Symbol) -> int:
        return self.program.states.index(str(symbol))

    # -- backward ------------------------------------------------------------------------------------------------------
    def _backward_level(self, level: int) -> str:
        program, text = self.program, ""
        if level == program.levels - 1:
            self.written = set()
            for q in range(len(self.means)):
                text += f"            clear(scratch, {after('dmu', q, 'R')}, R)\n"
            # Old states that nothing flows to, and kept quantities that only means take, begin at zero.
            text += self._unwritten()
        done = derivatives.backward(program, level)
        text += self._backward_pass(level, done)
        for q, mean in enumerate(self.means):
            if mean.level == level:
                for operand in mean.operands:
                    place = all_rows(self.places[gradient(operand)])
                    flow = f"(scratch, {after('dmu', q, 'R')})"
                    text += f"            add_mean(rows, d, ({place},), ({place}, {flow}, {weight(mean)}))\n"
        first = len(self.matrices)
        for g, group in reversed([*enumerate(self.groups)]):
            first -= len(group)
            if group[0].level != level:
                continue
            target = gradient(group[0].operand)
            base = (
                after("de", self.kept.index(group[0].operand), "R * w")
                if group[0].operand in self.kept
                else after("before", self._state(group[0].operand), "R * w")
            )
            operand = f"dp, {after('at_p', first, 'd')}, row_p"
            text += (
                f"            multiply(board, {g}, rows, {self._taken(group)}, scratch, {base}, w, {operand}, "
                f"u{g}, head, {self._given(group)}, {target in self.written})\n"
            )
            self.written.add(target)
        return text

    def _unwritten(self) -> str:
        """Clear the gradients that a step's passes may leave alone, or that a mean adds to first."""
        text = ""
        flowing = {
            target for k in range(self.program.levels) for target, _ in derivatives.backward(self.program, k).results
        }
        flowing |= {gradient(group[0].operand) for group in self.groups}
        averaged = {gradient(symbol) for mean in self.means for symbol in mean.operands}
        for s, name in enumerate(self.program.states):
            target = gradient(self.program.old(name))
            if target not in flowing or target in averaged:
                text += f"            clear(scratch, {after('before', s, 'R * w')}, R * w)\n"
                self.written.add(target)
        for k, symbol in enumerate(self.kept):
            if gradient(symbol) in averaged:
                text += f"            clear(scratch, {after('de', k, 'R * w')}, R * w)\n"
                self.written.add(gradient(symbol))
        for m, product in enumerate(self.matrices):
            if gradient(product.symbol) in averaged:
                at = f"{after('at_p', m, 'd')} + r * row_p"
                text += f"            for r in range(rows):\n                clear(dp, {at}, d)\n"
                self.written.add(gradient(product.symbol))
        # What nothing flows to, as in a condition alone.
        inputs = self.program.inputs
        silent = [
            *((symbol, f"dx, {after('at_x', g, 'D')} + r * row_x") for g, symbol in enumerate(map(Symbol, inputs))),
            *((product.symbol, f"dp, {after('at_p', m, 'd')} + r * row_p") for m, product in enumerate(self.matrices)),
        ]
        for symbol, at in silent:
            if gradient(symbol) not in flowing | averaged:
                text += f"            for r in range(rows):\n                clear({at}, d)\n"
        return text

    def _backward_pass(self, level: int, done: Pass) -> str:
        here = derivatives.roots(self.program, level)
        loads: dict[Symbol, str] = {}
        extra: dict[str, str] = {}
        seeds: list[tuple[Symbol, list[str]]] = []
        for symbol in here:
            names: list[str] = []
            for s, new in enumerate(self.program.new):
                if new == symbol:
                    names.append(f"{identifier(gradient(symbol))}_state{s}")
                    extra[names[-1]] = f"(scratch, {after('flow', s, 'R * w')} + w_r, w)"
            if symbol == self.program.output:
                names.append(f"{identifier(gradient(symbol))}_output")
                extra[names[-1]] = "(dy, y_r, row_y)"
            if symbol in self.kept:
                names.append(f"{identifier(gradient(symbol))}_kept")
                extra[names[-1]] = self.places[gradient(symbol)]
            seeds.append((gradient(symbol), names))
        read = derivatives.loads(done) - {seed for seed, _ in seeds}
        loads = {symbol: self.places[symbol] for symbol in sorted(read, key=str)}
        lines = "".join(f"    {identifier(seed)} = {' + '.join(names)}\n" for seed, names in seeds)

        summed = {gradient(Symbol(name)) for name in self.same if name in self.program.vectors}
        targets, results, totals = [], [], []
        for target, expression in done.results:
            if target in summed:
                continue  # summed over its product's gradient
            if target in {gradient(mean.symbol) for mean in self.means}:
                totals.append((target, expression))
                continue
            vector = target in {gradient(Symbol(name)) for name in self.program.vectors}
            text = emit(expression)
            if vector or target in self.written:
                name = f"{identifier(target)}_before"
                extra[name] = self.places[target]
                text = f"{name} + ({text})" if not isinstance(expression, Symbol) else f"{name} + {text}"
            self.written.add(target)
            targets.append(self.places[target])
            results.append(text)
        calls = ""
        if results:
            arguments = ", ".join([*map(identifier, loads), *extra])
            self.passes.append(
                f"def _backward_{level}({arguments}):\n{lines}{assignments(_needed(done, results))}"
                f"    return {', '.join(results)}\n\n\nbackward_{level} = elementwise(_backward_{level})\n\n\n"
            )
            inputs = ", ".join([*loads.values(), *extra.values()]) + ","
            calls = f"                    backward_{level}(n, d, ({', '.join(targets)},), ({inputs}))\n"
        seeding = {name: place for name, place in extra.items() if not name.endswith("_before")}
        first, rest = "", after("dmu", len(self.means), "R")
        for target, expression in totals:
            q = [gradient(mean.symbol) for mean in self.means].index(target)
            name = f"backward_{level}_mean_{q}"
            arguments = ", ".join([*map(identifier, loads), *seeding])
            self.passes.append(
                f"def _{name}({arguments}):\n{lines}{assignments(_needed(done, [emit(expression)]))}"
                f"    return {emit(expression)}\n\n\n"
                f"{name} = elementwise(_{name}, total=True)\n\n\n"
            )
            inputs = ", ".join([*loads.values(), *seeding.values()]) + ","
            first += f"                    {name}(n, d, ((scratch, {rest} + r),), ({inputs}))\n"
            first += f"                    add(scratch, {after('dmu', q, 'R')} + r, {rest} + r, n)\n"
        return _rows(first + calls) if first + calls else ""


def _helper(name: str, arguments: str, operands: list[str]) -> str:
    """What other threads do while one is in the kernel of that name: take part in its products."""
    text = f"@jit_views\ndef help_{name}(board, scratch, {arguments.rstrip(', ')}):\n    kind = wait(board)\n"
    text += "    while kind >= 0:\n"
    for g, operand in enumerate(operands):
        text += f"        {'elif' if g else 'if'} kind == {g}:\n            help_out(board, {g}, {operand}, u{g})\n"
    return text + "        kind = wait(board)\n"


def times(number: int, unit: str) -> str:
    """number * unit, for people to read."""
    return "0" if number == 0 else unit if number == 1 else f"{number} * {unit}"


def after(place: str, number: int, unit: str) -> str:
    """place + number * unit"""
    return f"{place} + {times(number, unit)}" if number else place


def weight(mean: Mean) -> str:
    """Of one number in a mean."""
    return "1.0 / d" if len(mean.operands) == 1 else f"1.0 / ({len(mean.operands)} * d)"


def all_rows(place: str) -> str:
    """The operand for all rows of a block, from that for those from r on."""
    return re.sub(r"\b(\w)_r\b", r"at_\1", place.replace(" + w_r", ""))


def _rows(calls: str) -> str:
    """The calls of a pass: for all rows at once, or one by one where some may be padding."""
    places = {**{f"{k}_r": f"at_{k} + r * row_{k}" for k in "xpsey"}, "w_r": "r * w"}
    used = {name: place for name, place in places.items() if re.search(rf"\b{name}\b", calls)}
    bases = f"{', '.join(used)} = {', '.join(used.values())}" if used else "pass"
    return ROWS.format(bases=bases, calls=calls)


def _needed(done: Pass, results: list[str]) -> list[tuple[Symbol, Expr]]:
    """The assignments that the results use."""
    wanted = set(re.findall(r"\w+", " ".join(results)))
    lines = []
    for symbol, expression in reversed(done.lets):
        if identifier(symbol) in wanted:
            lines.append((symbol, expression))
            wanted |= {identifier(s) for s in expression.free_symbols}
    return lines[::-1]
