"""Timings of the ops: forward, and forward with backward, over lengths, beside the ceilings of the same minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tidegate import ops, registry
from tidegate.bench import counts, machine
from tidegate.bench.counts import Counted, Shape
from tidegate.bench.report import Measurement
from tidegate.bench.sweep import Call, Candidate, measure
from tidegate.ops.gated_norm import gated_norm
from tidegate.ops.selective_scan import selective_scan


@dataclass(frozen=True)
class Case:
    """One thing to time: the inputs it takes (by their names in INPUTS), the op, and what its equation costs."""

    inputs: tuple[str, ...]
    op: Callable[..., Any]
    work: Callable[[Shape], Counted]
    quadratic: bool = False


# -- inputs: keys of length one, decays mostly close to one, as in a trained layer -------------------------------------
def _normal(shape: Shape, *sizes: int) -> Tensor:
    return torch.randn(shape.batch, shape.time, *sizes)


def _unit(shape: Shape) -> Tensor:
    return functional.normalize(_normal(shape, shape.heads, shape.key_dim), dim=-1)


def _decay(shape: Shape, *sizes: int) -> Tensor:
    return functional.logsigmoid(_normal(shape, *sizes) + 4)


def _values(shape: Shape) -> Tensor:
    return _normal(shape, shape.heads, shape.value_dim)


def _channels(shape: Shape) -> Tensor:
    return _normal(shape, shape.channels)


def _heads_first(make: Callable[[Shape], Tensor]) -> Callable[[Shape], Tensor]:
    return lambda shape: make(shape).transpose(1, 2).contiguous()


INPUTS: Mapping[str, Callable[[Shape], Tensor]] = MappingProxyType(
    {
        "q": _unit,
        "k": _unit,
        "v": _values,
        "beta": lambda s: torch.rand(s.batch, s.time, s.heads),
        "head_decay": lambda s: _decay(s, s.heads),
        "key_decay": lambda s: _decay(s, s.heads, s.key_dim),
        "a": lambda s: -_unit(s),  # removed along a, written along b
        "b": lambda s: _unit(s) * torch.rand(s.batch, s.time, s.heads, 1),
        "x": _channels,
        "decay": lambda s: _channels(s).sigmoid(),
        "log_input": lambda s: _normal(s, s.heads),
        "gate": _values,
        "norm_weight": lambda s: torch.rand(s.value_dim),
        "weight": lambda s: torch.randn(s.channels, counts.TAPS),
        "taps": lambda s: torch.randn(s.time, s.channels) / s.time**0.5,  # as a network of time makes them
        "dt": lambda s: 0.1 * torch.rand(s.batch, s.time, s.channels),
        "spread": lambda s: -torch.arange(1.0, counts.STATES + 1).repeat(s.channels, 1),
        "state_b": lambda s: _normal(s, counts.STATES),
        "state_c": lambda s: _normal(s, counts.STATES),
        "q_first": _heads_first(_unit),
        "k_first": _heads_first(_unit),
        "v_first": _heads_first(_values),
    }
)


class Inputs:
    """The tensors of one shape, each made when first asked for: cases of the same inputs share them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._made: dict[object, Tensor] = {}

    def take(self, names: Sequence[str]) -> list[Tensor]:
        """The inputs of these names."""
        return [self._once(name, partial(INPUTS[name], self.shape)) for name in names]

    def gradient(self, output: Tensor) -> Tensor:
        """A gradient for that output."""
        return self._once(output.shape, lambda: torch.randn_like(output, memory_format=torch.contiguous_format))

    def _once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


# -- cases -------------------------------------------------------------------------------------------------------------
def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True), None


def _long_convolution(x: Tensor, taps: Tensor, *, state: Any = None, segments: Any = None) -> tuple[Tensor, Any]:
    more = 0 if state is None else state[0].shape[1]  # taps for the past
    taps = functional.pad(taps, (0, 0, 0, more)) if more else taps
    return ops.long_convolution(x, taps.t(), state=state, segments=segments)


PEER = "torch/sdpa"  # what everything else is compared with
_QKV = ("q", "k", "v")

# After the slash the shape of the decay: one per head, or none; without it, key-wise (linear_attention, dplr) or none.
CASES: Mapping[str, Case] = MappingProxyType(
    {
        "scan": Case(("decay", "x"), ops.scan, counts.scan),
        "short_convolution": Case(("x", "weight"), ops.short_convolution, counts.short_convolution),
        "long_convolution": Case(("x", "taps"), _long_convolution, counts.long_convolution),
        "selective_scan": Case(("x", "dt", "spread", "state_b", "state_c"), selective_scan, counts.selective_scan),
        "linear_attention": Case(
            (*_QKV, "key_decay"), ops.linear_attention, lambda s: counts.linear_attention(s, s.key_dim)
        ),
        "linear_attention/head": Case(
            (*_QKV, "head_decay"), ops.linear_attention, lambda s: counts.linear_attention(s, 1)
        ),
        "linear_attention/none": Case(_QKV, ops.linear_attention, lambda s: counts.linear_attention(s, 0)),
        "delta_rule": Case((*_QKV, "beta"), ops.delta_rule, lambda s: counts.delta_rule(s, 0)),
        "delta_rule/head": Case((*_QKV, "beta", "head_decay"), ops.delta_rule, lambda s: counts.delta_rule(s, 1)),
        "dplr": Case((*_QKV, "a", "b", "key_decay"), ops.dplr, counts.dplr),
        "mlstm": Case((*_QKV, "log_input", "head_decay"), ops.mlstm, counts.mlstm),
        "gated_norm": Case(("v", "gate", "norm_weight"), lambda *x: (gated_norm(*x), None), counts.gated_norm),
        "attention": Case(_QKV, ops.attention, counts.attention, quadratic=True),
        PEER: Case(("q_first", "k_first", "v_first"), _sdpa, counts.attention, quadratic=True),
    }
)


def sweep(
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    repetitions: int = 7,
    patience: float = 5.0,
    ceilings: Mapping[str, int] = MappingProxyType({}),
    **shape: int,
) -> Iterator[Measurement]:
    """Time every case at every length; per length all of them and the machine's ceilings take turns.

    `shape` gives batch, heads, key_dim and value_dim of `Shape`, `ceilings` the sizes of `machine.ceilings`. A
    quadratic case that would take longer than `patience` seconds, judged by the length before, is left out.
    Raises ValueError for an unknown name.
    """
    for name in names:
        _case(name)
    limits = machine.ceilings(**ceilings)
    slow: set[str] = set()
    for length in sorted(lengths):
        inputs = Inputs(replace(Shape(**shape), time=length))
        present = [_candidate(name, inputs) for name in names if name not in slow]
        for found in measure(present, limits, repetitions, patience):
            yield found
            if CASES[found.name].quadratic and 4 * found.training.median > patience:
                slow.add(found.name)


def prepare(name: str, *, length: int, **shape: int) -> Call:
    """Forward with backward into every input of one case, as a call; its inputs are made here."""
    return runs(_case(name), Inputs(replace(Shape(**shape), time=length)))[1]


def runs(case: Case, inputs: Inputs) -> tuple[Call, Call]:
    """Forward without a graph, and forward with backward into every input."""
    given = inputs.take(case.inputs)
    leaves = [x.detach().requires_grad_() for x in given]  # the same memory

    def forward() -> object:
        with torch.no_grad():
            return case.op(*given)[0]

    def training() -> object:
        output = case.op(*leaves)[0]
        return torch.autograd.grad(output, leaves, inputs.gradient(output))

    return forward, training


def _candidate(name: str, inputs: Inputs) -> Candidate:
    forward, backward = CASES[name].work(inputs.shape)
    return Candidate(
        name, inputs.shape.batch, inputs.shape.time, *runs(CASES[name], inputs), forward, forward + backward
    )


def _case(name: str) -> Case:
    if name not in CASES:
        raise ValueError(f"op: there is no {name!r}{registry.did_you_mean(name, CASES)}; known are {', '.join(CASES)}")
    return CASES[name]
