"""Look inside a mixer or a model: every linear recurrence in it as a dynamical system, and as an attention matrix.

One run is enough. Recurrences go through a few ops, whose calls are recorded; what each call was given says which
system it is (members.py). So this works for every mixer built on them, without knowing the mixer.

>>> import torch
>>> from tidegate import mixers
>>> seen = explain(mixers.build("retnet", dim=32, num_heads=2), torch.randn(1, 12, 32))
>>> (system,) = seen.systems
>>> system.attention.shape, system.eigenvalues[0, 5, :, 0].real
(torch.Size([1, 2, 12, 12]), tensor([0.9688, 0.9844], dtype=torch.float64))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.methods.explain.members import MEMBERS, refusal
from tidegate.methods.explain.system import System
from tidegate.nn.mixer import Mixer
from tidegate.ops.calls import Call, answered_by

__all__ = ["Explanation", "System", "explain", "rebuild"]


@dataclass(frozen=True)
class Explanation:
    """What `explain` saw: the module's output, and a `System` for every call of a linear recurrence, in order.

    `refused` says of layers whose recurrence is not linear, by name, why there is no system of theirs.
    """

    output: Any
    systems: tuple[System, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


@torch.no_grad()
def explain(module: nn.Module, *inputs: Any, **options: Any) -> Explanation:
    """Run `module(*inputs, **options)`, a mixer on x (B, T, dim) or a model on its inputs, and look at its recurrences.

    The run is an ordinary one, in the module's own dtype and mode; systems are computed in float64 from what the ops
    were given. It has to begin from nothing: no state is passed.

    Raises ValueError for a module without linear recurrence, saying why (a GRU's gates see its state: there is no
    matrix), and for a run that begins with a state.
    """
    return _run(module, inputs, options, lambda system, result: result)


@torch.no_grad()
def rebuild(module: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """The output of `explain`'s run with every linear recurrence replaced by its matrix, computed in float64.

    It equals the module's own output up to rounding; that is what makes the matrices its explanation.
    """
    return _run(module, inputs, options, lambda system, result: (system.rebuilt(), *result[1:])).output


def _run(module: nn.Module, inputs: Any, options: Any, answer: Callable[[System, Any], Any]) -> Explanation:
    systems: list[System] = []
    refused: dict[str, str] = {}

    def hear(call: Call) -> Any:
        (layer, mixer), result = inside[-1], call.run()
        if reason := refusal(call.op, call.arguments):
            refused[layer] = f"{type(mixer).__name__}: {reason}"
            return result
        _check_empty(layer, call.arguments.get("state"))
        systems.append(System(call.op, layer, dict(call.arguments), result[0]))
        return answer(systems[-1], result)

    with _running(module) as inside, answered_by(hear):
        output = module(*inputs, **options)
    if not systems:
        why = "; ".join(dict.fromkeys(refused.values())) or _silence(module)
        raise ValueError(f"{why}. Wanted a linear recurrence, such as gla, mamba or attention has")
    return Explanation(output[0] if isinstance(output, tuple) else output, tuple(systems), refused)


@contextmanager
def _running(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """A list whose last entry is always the mixer that is running, with its name."""
    inside = [("", module)]
    hooks = []

    def leave(*_: Any) -> None:
        inside.pop()

    for name, part in module.named_modules():
        if isinstance(part, Mixer):
            hooks.append(part.register_forward_pre_hook(lambda part, _, name=name: inside.append((name, part))))
            hooks.append(part.register_forward_hook(leave))
    try:
        yield inside
    finally:
        for hook in hooks:
            hook.remove()


def _check_empty(layer: str, state: Any) -> None:
    leaves = state if isinstance(state, tuple) else () if state is None else (state,)
    if any(leaf.any() for leaf in leaves):
        raise ValueError(
            f"{layer or 'state'}: begins with a state that is not empty; explain needs the sequence from its start"
        )


def _silence(module: nn.Module) -> str:
    names = {type(part).__name__: None for part in module.modules() if isinstance(part, Mixer)}
    who = ", ".join(names) or type(module).__name__
    return f"{who}: none of {', '.join(MEMBERS)} has run, so there is no matrix to show"
