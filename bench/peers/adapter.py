"""What an adapter is: a function of a library, named after what it computes, over tensors that both sides are given.

Three kinds, by the first part of the function's name:

op      `@adapts("op/delta_rule", "transformers")` on `call(**inputs) -> output`.
layer   `@adapts("layer/lstm", "torch")` on `build(options, weights) -> (module, call, translate)`; `call(x) -> y`.
decode  `@adapts("decode/lstm", "torch")` on `build(options, weights) -> step`; `step(token) -> output` keeps its state.

`weights` are tidegate's parameters by name. `translate(weights)` gives the module's own parameters from them with
differentiable operations: it fills the module, and pulls the module's gradients back to tidegate's names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Adapter(NamedTuple):
    """One entry point of one library."""

    function: str  # what is computed, as in tidegate's own adapters
    name: str  # library and entry point
    make: Callable[..., Any]
    note: str = ""


registered: dict[str, Adapter] = {}


def adapts(function: str, name: str, note: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function or a builder under `name` as computing `function`."""

    def enter(make: Callable[..., Any]) -> Callable[..., Any]:
        registered[f"{function} {name}"] = Adapter(function, name, make, note)
        return make

    return enter


def fill(module: Any, own: dict[str, Any]) -> None:
    """Give a module the translated parameters; every parameter has to be among them."""
    import torch

    wanted = dict(module.named_parameters())
    if set(own) != set(wanted):
        raise ValueError(f"parameters: seen {sorted(own)}, wanted {sorted(wanted)}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != own[name].shape:
                raise ValueError(f"{name}: seen {tuple(own[name].shape)}, wanted {tuple(parameter.shape)}")
            parameter.copy_(own[name])
