"""Timings of nonlinear cells as whole layers, beside PyTorch's own modules and the plain loop over time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tidegate import backend, registry
from tidegate.bench import machine
from tidegate.bench.mixers import work
from tidegate.bench.report import Measurement
from tidegate.bench.sweep import Call, Candidate, measure

PEER = "torch/lstm"  # what everything else is compared with
PEERS = {PEER: ("lstm", nn.LSTM), "torch/gru": ("gru", nn.GRU), "torch/elman": ("elman", nn.RNN)}
LOOP = "loop/"  # before a cell's name: its equations in PyTorch, token by token


def names() -> list[str]:
    """Every cell, PyTorch's modules, and the loop of the LSTM."""
    own = [name for name in registry.names(streaming=True) if registry.info(name).family == "cell"]
    return [*own, *PEERS, f"{LOOP}lstm"]


def sweep(
    chosen: Sequence[str],
    lengths: Sequence[int],
    *,
    batch: int = 16,
    dim: int = 256,
    heads: int = 1,
    repetitions: int = 7,
    patience: float = 5.0,
    ceilings: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Measurement]:
    """Time every cell at every length, forward and with backward into input and parameters; per length in turns.

    `heads` is for the cells that have heads; PyTorch's modules have not. Raises ValueError for an unknown name.
    """
    layers = {name: _layer(name, dim, heads) for name in chosen}
    limits = machine.ceilings(**ceilings)
    for length in sorted(lengths):
        taken = []
        for name, layer in layers.items():
            own = PEERS[name][0] if name in PEERS else name.removeprefix(LOOP)
            costs = work(own, batch, length, dim, **_options(own, 1 if name in PEERS else heads))
            taken.append(Candidate(name, batch, length, *_runs(name, layer, batch, length, dim), *costs))
        yield from measure(taken, limits, repetitions, patience)


def prepare(name: str, *, batch: int, length: int, dim: int, heads: int) -> Call:
    """Forward with backward into input and parameters of one cell, as a call; parameters and input are made here."""
    return _runs(name, _layer(name, dim, heads), batch, length, dim)[1]


def _layer(name: str, dim: int, heads: int) -> nn.Module:
    if name in PEERS:
        return PEERS[name][1](dim, dim, batch_first=True)
    own = name.removeprefix(LOOP)
    if "/" in own:
        raise ValueError(f"names: seen {name!r}, wanted a cell, {LOOP}CELL, or one of {', '.join(PEERS)}")
    known = registry.info(own)
    if known.family != "cell":
        raise ValueError(f"names: {own!r} is no nonlinear cell; `tidegate bench mixers` times all")
    return registry.build(own, dim, **_options(own, heads))


def _options(name: str, heads: int) -> dict[str, Any]:
    return {"num_heads": heads} if "num_heads" in registry.info(name).options else {}


def _runs(name: str, layer: nn.Module, batch: int, length: int, dim: int) -> tuple[Call, Call]:
    x, gradient = torch.randn(batch, length, dim), torch.randn(batch, length, dim)
    leaf = x.detach().requires_grad_()  # the same memory
    leaves = [leaf, *layer.parameters()]

    def run(x: Tensor) -> Any:
        if not name.startswith(LOOP):
            return layer(x)[0]
        with backend("reference"):
            return layer(x)[0]

    def forward() -> object:
        with torch.no_grad():
            return run(x)

    def training() -> object:
        return torch.autograd.grad(run(leaf), leaves, gradient, allow_unused=True)

    return forward, training
