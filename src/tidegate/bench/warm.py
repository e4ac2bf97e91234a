"""Kernels, compiled before they are needed: what there is, and a call of everything that has one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tidegate
from tidegate import registry
from tidegate.bench import mixers, ops
from tidegate.bench.machine import threads
from tidegate.models.language import LanguageModel
from tidegate.ops.block_scan import block_scan

SHAPE = ops.Shape(batch=1, time=20, heads=2, key_dim=16, value_dim=16)
_DIM = 32


@dataclass(frozen=True)
class Warmed:
    """One call: what was called, which kernels it compiled, which it found in the cache on disk, and its seconds."""

    what: str
    direction: str
    compiled: tuple[str, ...]
    loaded: tuple[str, ...]
    seconds: float


def dispatchers() -> dict[str, Any]:
    """Every function in the package that Numba compiles, by its name, as `ops.scan.numba_cpu._forward`."""
    from numba.core.dispatcher import Dispatcher

    # Kernels live in modules that are imported when first needed; here they are needed.
    for listed in pkgutil.walk_packages(tidegate.__path__, "tidegate."):
        if listed.name.rpartition(".")[2] == "numba_cpu":
            importlib.import_module(listed.name)
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("tidegate."):
            for value in vars(module).values():
                if isinstance(value, Dispatcher) and value.py_func.__module__ == name:
                    found[f"{name.removeprefix('tidegate.')}.{value.py_func.__qualname__}"] = value
    return found


def kernels() -> dict[str, Any]:
    """Those of them that Python calls: no other one's code mentions them. What they call is compiled into them."""
    found = dispatchers()
    called = set()
    for function in (dispatcher.py_func for dispatcher in found.values()):
        mentioned = function.__code__.co_names  # of variables, and of what is taken out of modules
        values = [function.__globals__[name] for name in mentioned if name in function.__globals__]
        modules = [value for value in values if inspect.ismodule(value)]
        values += [getattr(module, name, None) for module in modules for name in mentioned]
        called |= {id(value) for value in values}
    return {
        name: dispatcher
        for name, dispatcher in found.items()
        if id(dispatcher) not in called and dispatcher._cache.cache_path is not None
    }


def shares(kernel: Any) -> bool:
    """Whether a kernel solves a range of problems, (begin, end, ...), as those do that `ops.kernels.run` spreads."""
    return list(inspect.signature(kernel.py_func).parameters)[:2] == ["begin", "end"]


def specialisations() -> dict[str, int]:
    """For how many combinations of argument types each function is compiled in this process."""
    return {name: len(found.signatures) for name, found in dispatchers().items()}


def warm() -> Iterator[Warmed]:
    """Call every op forward and backward, every mixer too, and the step machine; yields as it goes.

    A kernel is compiled once for all lengths, batches, segments and states, so small inputs will do. The mixers come
    after the ops, for kernels that stand between these, and last the step machine.
    """
    begin = time.perf_counter()
    entries = kernels()
    yield Warmed("numba and the kernels' modules", "import", (), (), time.perf_counter() - begin)
    seen = {name: _counts(kernel) for name, kernel in entries.items()}

    def timed(what: str, direction: str, call: Callable[[], Any]) -> Warmed:
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        before = dict(seen)
        seen.update({name: _counts(kernel) for name, kernel in entries.items()})
        new = [[name for name in entries if seen[name][kind] > before[name][kind]] for kind in (0, 1)]
        return Warmed(what, direction, tuple(new[0]), tuple(new[1]), seconds)

    with tidegate.backend("numba"):  # also where inputs as small as these would not be worth a kernel
        for name, case in ops.CASES.items():
            if "/" not in name:  # else a variation of its inputs' shapes, or not ours
                forward, training = ops.runs(case, ops.Inputs(SHAPE))
                yield timed(name, "forward", forward)
                yield timed(name, "backward", training)
        yield timed("long_convolution, long", "both", _long_convolution)
        yield timed("block_scan", "forward", lambda: block_scan(torch.ones(1, 2, 2, 2, 3), torch.ones(1, 2, 2, 3)))
        yield timed("all mixers", "both, and a step", _mixers)
    yield timed("compiled step", "forward", _step)


def _long_convolution() -> None:
    # Short sequences are summed up, long ones go through an FFT.
    x, taps = torch.randn(1, 1000, 1, requires_grad=True), torch.randn(1, 1000, requires_grad=True)
    tidegate.ops.long_convolution(x, taps)[0].sum().backward()


def _mixers() -> None:
    every = [(name, mixers.fitting(name, _DIM)) for name in registry.names(streaming=True)]
    model = LanguageModel(8, _DIM, every)  # with what stands around the mixers
    ids = torch.zeros(1, SHAPE.time, dtype=torch.int64)
    logits, state = model(ids)
    logits.sum().backward()
    with torch.no_grad():
        model.eval()(ids[:, :1], state.detach())


def _step() -> None:
    from tidegate.infer.step import compile_step

    # One interpreter runs all of them. A layer of this width is work for a second thread, which has its own kernel.
    mixer = mixers.build("linear-attention", 768)
    with threads(2):
        compile_step(mixer)(torch.randn(1, 1, mixer.dim), mixer.init_state(1))


def _counts(kernel: Any) -> tuple[int, int]:
    """Compilations and loads from the cache so far."""
    stats = kernel.stats
    return sum(stats.cache_misses.values()), sum(stats.cache_hits.values())
