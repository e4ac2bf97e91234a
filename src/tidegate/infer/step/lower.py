"""From a traced step to a program of the step machine.

The step is traced once (torch.fx, on tensors without data) into PyTorch's core operators. Here each becomes
instructions, or none: what only looks at a tensor differently is done with strides, what depends on parameters alone is
computed beforehand, and a product that is only added to something becomes part of the addition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tidegate.infer.step.machine import Op
from tidegate.infer.step.program import Program, Storage, Unsupported, Value, Writer, numbers

aten = torch.ops.aten

_VIEWS = {
    aten.alias.default,
    aten.detach.default,
    aten.diagonal.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view_as_real.default,
}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_COPIES = {aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default}
_UNARY = {
    "abs": Op.ABS,
    "bitwise_not": Op.NOT,
    "cos": Op.COS,
    "erf": Op.ERF,
    "exp": Op.EXP,
    "expm1": Op.EXPM1,
    "floor": Op.FLOOR,
    "log": Op.LOG,
    "log1p": Op.LOG1P,
    "logical_not": Op.NOT,
    "neg": Op.NEG,
    "reciprocal": Op.RECIPROCAL,
    "rsqrt": Op.RSQRT,
    "sigmoid": Op.SIGMOID,
    "sin": Op.SIN,
    "sqrt": Op.SQRT,
    "tanh": Op.TANH,
}
_BINARY = {
    "add": Op.ADD,
    "bitwise_and": Op.MUL,  # of truth values, as the following
    "bitwise_or": Op.MAX,
    "logical_and": Op.MUL,
    "logical_or": Op.MAX,
    "div": Op.DIV,
    "eq": Op.EQ,
    "le": Op.LE,
    "lt": Op.LT,
    "maximum": Op.MAX,
    "minimum": Op.MIN,
    "mul": Op.MUL,
    "ne": Op.NE,
    "sub": Op.SUB,
}
_SWAPPED = {"ge": Op.LE, "gt": Op.LT}
_IN_PLACE = {"add_", "div_", "mul_", "sub_"}
_POWERS = {2: Op.SQUARE, 0.5: Op.SQRT, -0.5: Op.RSQRT, -1: Op.RECIPROCAL}


@dataclass(frozen=True)
class _Product:
    """A product not computed yet, because its only use is a sum."""

    factors: tuple[Any, Any]
    node: fx.Node


def hold(tensor: Tensor) -> Tensor:
    """A tensor as the machine can read it."""
    if tensor.is_complex():
        return tensor.resolve_conj()
    return tensor if tensor.dtype == torch.int64 else tensor.to(numbers(tensor.dtype))


def fill(node: fx.Node) -> Tensor | None:
    """The result of an operator that looks at no more than the shape of what it is given."""
    name, arguments = _name(node), _arguments(node)
    ones = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}
    if name not in ones and name not in ("full_like", "new_full"):
        return None
    return torch.full(_result(node).shape, ones.get(name, arguments[-1]), dtype=_result(node).dtype, device="cpu")


class Lowering:
    """One pass over the graph of a traced step, whose first `parameters` placeholders are the module's weights.

    `evaluate` gives the tensor of a node that depends on them alone. After `run`, the program needs those in `statics`.
    """

    def __init__(self, graph: fx.Graph, parameters: int, evaluate: Callable[[fx.Node], Any]) -> None:
        self._graph, self._evaluate = graph, evaluate
        self._writer = Writer()
        self._values: dict[fx.Node, Any] = {}
        self.statics: list[fx.Node] = []
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self._inputs = placeholders[parameters:]
        self._constant = self._find_static(placeholders[:parameters])

    def run(self) -> Program:
        """The program. Raises Unsupported."""
        for index, node in enumerate(self._inputs):
            self._values[node] = self._input(index, _result(node))
        for node in self._graph.nodes:
            if node.op == "output":
                for leaf in _arguments(node)[0]:
                    self._writer.output(self._of(leaf), _result(leaf).dtype)
            elif node not in self._values and node not in self._constant:
                self._values[node] = self._lower(node)
        return self._writer.finish(len(self.statics), len(self._inputs))

    def _find_static(self, parameters: Sequence[fx.Node]) -> dict[fx.Node, bool]:
        """Nodes that depend on no input; True for those that depend on no parameter either."""
        known = dict.fromkeys(parameters, False)
        for node in self._graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and fill(node) is not None):
                known[node] = True
            elif node.op == "call_function" and all(source in known for source in node.all_input_nodes):
                known[node] = all(known[source] for source in node.all_input_nodes)
        return known

    # -- arguments -----------------------------------------------------------------------------------------------------
    def _input(self, index: int, like: Tensor) -> Value:
        value = Value(Storage("input", index), torch.empty(like.shape, dtype=like.dtype, device="meta"))
        return self._writer.convert(Op.BYTE_TO_FLOAT, value, torch.float32) if like.dtype == torch.bool else value

    def _of(self, argument: Any) -> Any:
        """The Value of an argument, or the Python number that it is."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self._values:
            tensor = hold(self._evaluate(argument))
            layout = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._values[argument] = Value(Storage("static", len(self.statics)), layout)
            self.statics.append(argument)
        value = self._values[argument]
        if isinstance(value, _Product):
            value = self._values[argument] = self._elementwise(Op.MUL, value.factors, value.node)
        return value

    def _always(self, argument: Any) -> bool | None:
        """The truth of a condition that is the same everywhere and always, else None."""
        if isinstance(argument, fx.Node) and self._constant.get(argument):
            tensor = self._evaluate(argument)
            values = set(tensor.flatten().tolist())
            return values.pop() if len(values) == 1 else None
        return None

    # -- operators -----------------------------------------------------------------------------------------------------
    def _lower(self, node: fx.Node) -> Any:
        target, arguments, name = node.target, _arguments(node), _name(node)
        if target is operator.getitem:
            return self._values[arguments[0]][arguments[1]]
        if target in _VIEWS or target in _RESHAPES:
            return self._view(node)
        if target in _COPIES:
            return self._of(arguments[0])
        if name in _IN_PLACE:  # decompositions overwrite what nobody reads again as it was
            result = self._values[arguments[0]] = self._binary(_BINARY[name[:-1]], arguments[0], arguments[1], node)
            return result
        if any(_is_complex(operand) for operand in (node, *arguments)) and name not in ("view_as_complex", "cat"):
            return self._complex(node)
        if name in _UNARY:
            return self._elementwise(_UNARY[name], arguments[:1], node)
        if name in _BINARY or name in _SWAPPED:
            if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode"):
                raise Unsupported(f"the operator {target} with {dict(node.kwargs)}")
            if name.startswith("bitwise") and _result(node).dtype != torch.bool:
                raise Unsupported(f"the operator {target} on integers")
            a, b = arguments[:2]
            return (
                self._binary(_SWAPPED[name], b, a, node)
                if name in _SWAPPED
                else self._binary(_BINARY[name], a, b, node)
            )
        method = getattr(self, f"_op_{name.strip('_')}", None)
        if method is None:
            raise Unsupported(f"the operator {target}")
        return method(node, *arguments)

    def _view(self, node: fx.Node) -> Any:
        value, target, arguments = self._of(_arguments(node)[0]), node.target, _arguments(node)[1:]
        if target in _RESHAPES:
            target = aten.view.default
            try:
                layout = target(value.layout, *arguments)
            except RuntimeError:  # rows that are not where a view would look for them
                value = self._writer.copy(value)
                layout = target(value.layout, *arguments)
        else:
            layout = target(value.layout, *arguments, **node.kwargs)  # type: ignore[operator]
        return [value.at(part) for part in layout] if isinstance(layout, list | tuple) else value.at(layout)

    def _elementwise(self, op: Op, arguments: Sequence[Any], node: fx.Node) -> Value:
        """An instruction, calculated in float64 where PyTorch does."""
        wide = any(numbers(_result(x).dtype) == torch.float64 for x in (node, *arguments) if isinstance(x, fx.Node))
        operands = [self._of(argument) for argument in arguments]
        if wide:
            operands = [self._writer.cast(operand, torch.float64) for operand in operands]
        return self._fit(self._writer.elementwise(op, operands, _result(node).shape), node)

    def _fit(self, value: Any, node: fx.Node) -> Value:
        return self._writer.cast(value, numbers(_result(node).dtype))

    def _binary(self, op: Op, a: Any, b: Any, node: fx.Node) -> Any:
        if op is Op.MUL and self._is_summed(node):
            return _Product((a, b), node)
        if op is Op.ADD:
            found = [self._values.get(x) if isinstance(x, fx.Node) else None for x in (a, b)]
            products = [value for value in found if isinstance(value, _Product)]
            factors = [factor for product in products for factor in product.factors]
            if len(products) == 2:
                return self._elementwise(Op.TWO_PRODUCTS, factors, node)
            if products:
                return self._elementwise(Op.FMA, [*factors, b if isinstance(found[0], _Product) else a], node)
        return self._elementwise(op, [a, b], node)

    def _is_summed(self, node: fx.Node) -> bool:
        """Whether a product's only use is to be added to something, so that both can be done at once."""
        if len(node.users) != 1 or _result(node).dtype != torch.float32:
            return False
        user = next(iter(node.users))
        different = user.target is aten.add.Tensor and _arguments(user)[0] is not _arguments(user)[1]
        return bool(different and user.kwargs.get("alpha", 1) == 1 and _result(user).dtype == torch.float32)

    def _op_where(self, node: fx.Node, condition: Any, yes: Any, no: Any) -> Value:
        truth = self._always(condition)
        if truth is None:
            return self._elementwise(Op.WHERE, [condition, yes, no], node)
        chosen = self._fit(self._of(yes if truth else no), node)
        return chosen.at(chosen.layout.expand(_result(node).shape))

    def _op_pow(self, node: fx.Node, base: Any, exponent: Any) -> Value:
        if isinstance(exponent, int | float) and exponent in _POWERS:
            return self._elementwise(_POWERS[exponent], [base], node)
        return self._elementwise(Op.POW, [base, exponent], node)

    def _op_clamp(self, node: fx.Node, value: Any, low: Any = None, high: Any = None) -> Value:
        found = self._of(value)
        for op, bound in ((Op.MAX, node.kwargs.get("min", low)), (Op.MIN, node.kwargs.get("max", high))):
            if bound is not None:
                found = self._writer.elementwise(op, [found, self._of(bound)], _result(node).shape)
        return self._fit(found, node)

    def _op_relu(self, node: fx.Node, value: Any) -> Value:
        return self._elementwise(Op.MAX, [value, 0.0], node)

    def _op_remainder(self, node: fx.Node, value: Any, divisor: Any) -> Value:
        shape, operand = _result(node).shape, self._of(divisor)
        quotient = self._writer.elementwise(Op.DIV, [self._of(value), operand], shape)
        whole = self._writer.elementwise(Op.FLOOR, [quotient], shape)
        multiple = self._writer.elementwise(Op.MUL, [whole, operand], shape)
        return self._fit(self._writer.elementwise(Op.SUB, [self._of(value), multiple], shape), node)

    def _op_to_copy(self, node: fx.Node, value: Any) -> Value:
        if _result(node).dtype == torch.int64 and _result(value).dtype.is_floating_point:
            raise Unsupported("rounding to integers")
        return self._fit(self._of(value), node)

    def _op_cat(self, node: fx.Node, tensors: Sequence[fx.Node], axis: int = 0) -> Value:
        parts = [part for part in tensors if _result(part).numel()]
        if len(parts) == 1:
            return self._fit(self._of(parts[0]), node)
        if _is_complex(node):
            raise Unsupported("joining complex tensors")
        result = self._writer.new(_result(node).shape, numbers(_result(node).dtype))
        begin = 0
        for part in parts:
            value = self._fit(self._of(part), node)
            self._writer.copy(value, result.at(result.layout.narrow(axis, begin, value.shape[axis])))
            begin += value.shape[axis]
        return result

    def _op_constant_pad_nd(self, node: fx.Node, tensor: Any, amounts: Sequence[int], number: float = 0.0) -> Value:
        value = self._fit(self._of(tensor), node)
        result = self._writer.new(_result(node).shape, value.dtype)
        filler = self._writer.constant(number, value.dtype)
        self._writer.copy(filler.at(filler.layout.expand(result.shape)), result)
        inside, target = value.layout, result.layout
        for position in range(len(amounts) // 2):
            axis = inside.ndim - 1 - position
            low, high = amounts[2 * position : 2 * position + 2]
            kept = inside.shape[axis] + min(low, 0) + min(high, 0)
            inside = inside.narrow(axis, max(0, -low), kept)
            target = target.narrow(axis, max(0, low), kept)
        self._writer.copy(value.at(inside), result.at(target))
        return result

    # -- sums ----------------------------------------------------------------------------------------------------------
    def _op_sum(self, node: fx.Node, *arguments: Any) -> Value:
        return self._reduced(Op.SUM, node)

    def _op_amax(self, node: fx.Node, *arguments: Any) -> Value:
        return self._reduced(Op.ROW_MAX, node)

    def _op_amin(self, node: fx.Node, *arguments: Any) -> Value:
        return self._reduced(Op.ROW_MIN, node)

    def _reduced(self, op: Op, node: fx.Node) -> Value:
        value, axes = self._of(_arguments(node)[0]), _axes(node)
        if all(value.shape[axis] == 1 for axis in axes):  # of one number each
            return self._fit(value.at(value.layout.view(_result(node).shape)), node)
        if _result(node).dtype != torch.float32:
            raise Unsupported(f"the operator {node.target} giving {_result(node).dtype}")
        total = self._writer.reduce(op, value, axes)
        return total.at(total.layout.view(_result(node).shape))

    def _op_mean(self, node: fx.Node, tensor: Any, *arguments: Any) -> Value:
        mean = self._mean(self._of(tensor), _axes(node))
        return mean.at(mean.layout.view(_result(node).shape))

    def _op_var_mean(self, node: fx.Node, tensor: Any, *arguments: Any) -> list[Value]:
        if node.kwargs.get("correction", 1):
            raise Unsupported("a variance with a correction")
        value, axes = self._of(tensor), _axes(node)
        mean = self._mean(value, axes)
        distance = self._writer.elementwise(Op.SUB, [value, mean], value.shape)
        variance = self._mean(self._writer.elementwise(Op.SQUARE, [distance], value.shape), axes)
        shape = node.meta["val"][0].shape
        return [part.at(part.layout.view(shape)) for part in (variance, mean)]

    def _mean(self, value: Value, axes: Sequence[int]) -> Value:
        total = self._writer.reduce(Op.SUM, value, axes)
        share = total.layout.numel() / value.layout.numel()
        return self._writer.elementwise(Op.MUL, [total, share], total.shape)

    def _op_cumsum(self, node: fx.Node, tensor: Any, axis: int) -> Value:
        if _result(tensor).shape[axis] != 1:
            raise Unsupported(f"the operator {node.target} over more than one position")
        return self._fit(self._of(tensor), node)

    def _op_cummax(self, node: fx.Node, tensor: Any, axis: int) -> list[Any]:
        if _result(tensor).shape[axis] != 1:
            raise Unsupported(f"the operator {node.target} over more than one position")
        return [self._of(tensor), 0]  # the maximum, and where it was

    def _op_any(self, node: fx.Node, tensor: Any, axis: int, *arguments: Any) -> Value:
        if _result(tensor).dtype != torch.bool:
            raise Unsupported(f"the operator {node.target} on {_result(tensor).dtype}")
        largest = self._writer.reduce(Op.ROW_MAX, self._of(tensor), [axis])
        return largest.at(largest.layout.view(_result(node).shape))

    # -- other places ----------------------------------------------------------------------------------------------
    def _op_topk(self, node: fx.Node, tensor: Any, k: int, axis: int = -1, largest: bool = True, *rest: Any) -> Any:
        """By rank, which is how many others are larger, or equal and stand before: n^2 comparisons for n entries."""
        value, calculate = self._fit(self._of(tensor), tensor), self._writer.elementwise
        if axis % value.layout.ndim != value.layout.ndim - 1 or not largest or value.dtype != torch.float32:
            raise Unsupported(f"the operator {node.target} over another axis than the last, or for other numbers")
        *outer, n = value.shape
        index = self._writer.new((n,))
        for entry in range(n):
            self._writer.copy(self._writer.constant(entry, torch.float32), index.at(index.layout[entry]))

        (own, others), (at, before) = (
            [x.at(x.layout.unsqueeze(-1)), x.at(x.layout.unsqueeze(-2))] for x in (value, index)
        )
        square, shape = (*outer, n, n), (*outer, k, n)
        equal, earlier = calculate(Op.EQ, [own, others], square), calculate(Op.LT, [before, at], (n, n))
        ties = calculate(Op.MUL, [equal, earlier], square)
        ahead = calculate(Op.ADD, [calculate(Op.LT, [own, others], square), ties], square)
        rank = self._writer.reduce(Op.SUM, ahead, [-1])
        places = index.at(index.layout[:k].unsqueeze(-1))
        chosen = calculate(Op.EQ, [rank.at(rank.layout.transpose(-1, -2)), places], shape)
        found = [
            self._writer.reduce(Op.SUM, calculate(Op.WHERE, [chosen, x, 0.0], shape), [-1]) for x in (others, index)
        ]
        return [part.at(part.layout.squeeze(-1)) for part in found]

    def _op_index_select(self, node: fx.Node, tensor: Any, axis: int, index: Any) -> Value:
        table = self._fit(self._of(tensor), tensor)
        if axis != 0 or table.dtype != torch.float32:
            raise Unsupported(f"the operator {node.target} along axis {axis} of {_result(tensor).dtype}")
        try:
            table = table.at(table.layout.view(table.shape[0], -1))
        except RuntimeError:
            table = self._writer.copy(table)
            table = table.at(table.layout.view(table.shape[0], -1))
        rows = self._writer.rows(table, self._of(index))
        return rows.at(rows.layout.view(_result(node).shape))

    def _op_scatter(self, node: fx.Node, tensor: Any, axis: int, index: Any, source: Any) -> Value:
        shapes = [_result(x).shape for x in (tensor, index, source) if isinstance(x, fx.Node)]
        if len(set(shapes)) != 1 or len(shapes) != 3 or shapes[0][axis] != 1:
            raise Unsupported(f"the operator {node.target} over more than one position")
        return self._fit(self._of(source), node)

    # -- products ------------------------------------------------------------------------------------------------------
    def _op_mm(self, node: fx.Node, a: Any, b: Any) -> Value:
        left, right = (value.at(value.layout.unsqueeze(0)) for value in (self._of(a), self._of(b)))
        result = self._writer.product(left, right)
        return result.at(result.layout.squeeze(0))

    def _op_bmm(self, node: fx.Node, a: Any, b: Any) -> Value:
        return self._writer.product(self._of(a), self._of(b))

    def _op_embedding(self, node: fx.Node, table: Any, indices: Any, *arguments: Any) -> Value:
        return self._writer.rows(self._of(table), self._of(indices))

    # -- complex numbers: pairs of real ones ---------------------------------------------------------------------------
    def _op_view_as_complex(self, node: fx.Node, tensor: Any) -> Value:
        return self._pair(self._of(tensor))

    def _pair(self, value: Value) -> Value:
        try:
            return value.at(torch.view_as_complex(value.layout))
        except RuntimeError:  # the two parts are not neighbours
            copied = self._writer.copy(value)
            return copied.at(torch.view_as_complex(copied.layout))

    def _parts(self, argument: Any) -> tuple[Any, Any]:
        """Real and imaginary part."""
        value = self._of(argument)
        if not isinstance(value, Value) or not value.dtype.is_complex:
            return value, 0.0
        pair = torch.view_as_real(value.layout)
        return value.at(pair[..., 0]), value.at(pair[..., 1])

    def _complex(self, node: fx.Node) -> Value:
        name, arguments = _name(node), _arguments(node)
        if name in ("real", "imag"):
            return self._parts(arguments[0])[name == "imag"]
        if name == "_to_copy":
            return self._of(arguments[0])
        shape, calculate = _result(node).shape, self._writer.elementwise
        if name == "where":
            truth = self._always(arguments[0])
            if truth is None:
                raise Unsupported("a choice between complex tensors")
            chosen = self._of(arguments[1 if truth else 2])
            return chosen.at(chosen.layout.expand(shape))
        if name not in ("add", "sub", "mul"):
            raise Unsupported(f"the operator {node.target} on complex tensors")
        (ar, ai), (br, bi) = self._parts(arguments[0]), self._parts(arguments[1])
        if name == "mul":
            real = calculate(Op.SUB, [calculate(Op.MUL, [ar, br], shape), calculate(Op.MUL, [ai, bi], shape)], shape)
            imaginary = calculate(Op.FMA, [ar, bi, calculate(Op.MUL, [ai, br], shape)], shape)
        else:
            op = _BINARY[name]
            real, imaginary = calculate(op, [ar, br], shape), calculate(op, [ai, bi], shape)
        result = self._writer.new((*shape, 2))
        for part, value in enumerate((real, imaginary)):
            self._writer.copy(value, result.at(result.layout[..., part]))
        return self._pair(result)


# -- about nodes -------------------------------------------------------------------------------------------------------
def _name(node: fx.Node) -> str:
    """ "mul" of aten::mul.Tensor."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _result(node: fx.Node) -> Tensor:
    return node.meta["val"]


def _axes(node: fx.Node) -> Sequence[int]:
    arguments = _arguments(node)
    return arguments[1] if len(arguments) > 1 and arguments[1] else range(_result(arguments[0]).ndim)


def _is_complex(argument: Any) -> bool:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return isinstance(value, Tensor) and value.is_complex()
