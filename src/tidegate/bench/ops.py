"""Timings of the ops: forward, and forward with backward, over lengths, beside the ceilings of the same minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from tidegate import ops, registry
from tidegate.bench import machine
from tidegate.bench.report import Measurement
from tidegate.bench.timing import interleaved

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """The letters B, T, H, K, V."""

    batch: int = 4
    time: int = 2048
    heads: int = 4
    key_dim: int = 64
    value_dim: int = 64

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.batch * self.time


@dataclass(frozen=True)
class Case:
    """One thing to time: its inputs for a shape, the call, and what a forward costs.

    `work` is in floating-point operations against the matrix-product ceiling, or, for `bound="stream"`, in bytes read
    and written against the memory ceiling; with its backward a call costs `training` times that.
    """

    inputs: Callable[[Shape], Inputs]
    call: Callable[..., Tensor]
    work: Callable[[Shape], float]
    bound: str = "matmul"
    training: float = 3.0  # the gradient of a product is two products
    quadratic: bool = False


# -- inputs: keys of length one, decays mostly close to one, as in a trained layer -------------------------------------
def _normal(shape: Shape, *sizes: int) -> Tensor:
    return torch.randn(shape.batch, shape.time, *sizes)


def _unit(shape: Shape) -> Tensor:
    return functional.normalize(_normal(shape, shape.heads, shape.key_dim), dim=-1)


def _decay(shape: Shape, *sizes: int) -> Tensor:
    return functional.logsigmoid(_normal(shape, *sizes) + 4)


def _qkv(shape: Shape) -> Inputs:
    return _unit(shape), _unit(shape), _normal(shape, shape.heads, shape.value_dim)


def _head_decay(shape: Shape) -> Tensor:
    return _decay(shape, shape.heads)


def _key_decay(shape: Shape) -> Tensor:
    return _decay(shape, shape.heads, shape.key_dim)


def _beta(shape: Shape) -> Tensor:
    return torch.rand(shape.batch, shape.time, shape.heads)


def _dplr(shape: Shape) -> Inputs:
    q, k, v = _qkv(shape)
    removed = _unit(shape)
    return q, k, v, -removed, removed * _beta(shape).unsqueeze(-1), _key_decay(shape)


def _channels(shape: Shape) -> int:
    return shape.heads * shape.value_dim


def _heads_first(shape: Shape) -> Inputs:
    return tuple(x.transpose(1, 2).contiguous() for x in _qkv(shape))


# -- work --------------------------------------------------------------------------------------------------------------
def _state_flops(family: str) -> Callable[[Shape], float]:
    per_element = registry.FAMILIES[family][1]
    return lambda s: per_element * s.tokens * s.heads * s.key_dim * s.value_dim


def _pair_flops(s: Shape) -> float:
    """Two products over the causal half of all pairs of tokens."""
    return s.batch * s.heads * s.time * (s.time + 1) / 2 * 2 * (s.key_dim + s.value_dim)


def _float_bytes(tensors: int) -> Callable[[Shape], float]:
    return lambda s: 4.0 * tensors * s.tokens * _channels(s)


_outer, _delta = _state_flops("linear_attention"), _state_flops("delta")

# After the slash the shape of the decay: one per head, or none; without it, key-wise (linear_attention, dplr) or none.
CASES: Mapping[str, Case] = MappingProxyType(
    {
        "scan": Case(
            lambda s: (_normal(s, _channels(s)).sigmoid(), _normal(s, _channels(s))),
            lambda a, b: ops.scan(a, b)[0],
            _float_bytes(3),
            bound="stream",
            training=8 / 3,  # backward: gradient, a and h in, two gradients out
        ),
        "short_convolution": Case(
            lambda s: (_normal(s, _channels(s)), torch.randn(_channels(s), 4)),
            lambda x, weight: ops.short_convolution(x, weight)[0],
            _float_bytes(2),
            bound="stream",
            training=5 / 2,  # backward: gradient and x in, one gradient out
        ),
        "linear_attention": Case(
            lambda s: (*_qkv(s), _key_decay(s)),
            lambda q, k, v, g: ops.linear_attention(q, k, v, g)[0],
            _outer,
        ),
        "linear_attention/head": Case(
            lambda s: (*_qkv(s), _head_decay(s)),
            lambda q, k, v, g: ops.linear_attention(q, k, v, g)[0],
            _outer,
        ),
        "linear_attention/none": Case(_qkv, lambda q, k, v: ops.linear_attention(q, k, v)[0], _outer),
        "delta_rule": Case(
            lambda s: (*_qkv(s), _beta(s)),
            lambda q, k, v, beta: ops.delta_rule(q, k, v, beta)[0],
            _delta,
        ),
        "delta_rule/head": Case(
            lambda s: (*_qkv(s), _beta(s), _head_decay(s)),
            lambda q, k, v, beta, g: ops.delta_rule(q, k, v, beta, g)[0],
            _delta,
        ),
        "dplr": Case(_dplr, lambda q, k, v, a, b, g: ops.dplr(q, k, v, a, b, g)[0], _delta),
        "attention": Case(_qkv, lambda q, k, v: ops.attention(q, k, v)[0], _pair_flops, quadratic=True),
        "torch/sdpa": Case(
            _heads_first,
            lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
            _pair_flops,
            quadratic=True,
        ),
    }
)
PEER = "torch/sdpa"  # what linear_attention is compared with


def sweep(
    names: Sequence[str],
    lengths: Sequence[int],
    shape: Shape,
    *,
    repetitions: int = 7,
    patience: float = 5.0,
    ceiling_size: int = 1536,
    stream_elements: int = 1 << 25,
) -> Iterator[Measurement]:
    """Time every case at every length; per length all of them and the machine's ceilings take turns.

    A quadratic case that would take longer than `patience` seconds, judged by the length before, is left out.
    Raises ValueError for an unknown name.
    """
    for name in names:
        if name not in CASES:
            raise ValueError(
                f"op: there is no {name!r}{registry.did_you_mean(name, CASES)}; known are {', '.join(CASES)}"
            )
    ceilings = [machine.matmul(ceiling_size), machine.stream(stream_elements)]
    slow: set[str] = set()
    for length in sorted(lengths):
        here = replace(shape, time=length)
        present = [name for name in names if name not in slow]
        runs = [run for name in present for run in _runs(CASES[name], here)]
        timings = interleaved([call for call, _ in ceilings] + runs, repetitions, patience=patience)
        rates = {
            bound: work / timing.median
            for bound, (_, work), timing in zip(("matmul", "stream"), ceilings, timings, strict=False)
        }
        for position, name in enumerate(present):
            case = CASES[name]
            forward, training = timings[2 + 2 * position : 4 + 2 * position]
            work = case.work(here)
            yield Measurement(
                name,
                length,
                here.tokens,
                forward,
                training,
                bound=case.bound,
                ceiling=rates[case.bound],
                reached=work / forward.median / rates[case.bound],
                reached_training=case.training * work / training.median / rates[case.bound],
            )
            if case.quadratic and 4 * training.median > patience:
                slow.add(name)


def _runs(case: Case, shape: Shape) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without a graph, and forward with backward into every input."""
    inputs = case.inputs(shape)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        gradient = torch.randn_like(case.call(*inputs))

    def forward() -> object:
        with torch.no_grad():
            return case.call(*inputs)

    def training() -> object:
        return torch.autograd.grad(case.call(*leaves), leaves, gradient)

    return forward, training
