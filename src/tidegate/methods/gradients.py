"""How far back a layer learns: the gradient of one output with respect to every state before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer
from tidegate.registry import exceptions_of
from tidegate.state import State


def state_gradient_profile(
    module: nn.Module,
    x: Tensor,
    state: State | None = None,
    *,
    direction: Tensor | None = None,
    entries: Sequence[str] | None = None,
) -> Tensor:
    """log10 of the norm of dL/dstate_t for t = 0 ... T - 1, in every row: gradients that vanish, last or explode.

    Equation, state_0 being what the sequence begins with, state_t what is remembered after t tokens::

        L = <y_T, direction>        profile[:, t] = log10 ||dL / dstate_t||

    So `profile[:, t]` is T - t tokens before the output, and `profile - profile[:, -1:]` is relative to its last step.

    - `module` is a mixer on x (B, T, dim), or a model on its inputs, in its own dtype and mode. It is given one token
      at a time, so that all it knows of the past is its state; memory grows with T.
    - `direction` has the shape of y_T, (B, dim); by default it is drawn from N(0, 1).
    - `entries` are names of the state, such as "c" or "0/mixer"; by default all that are not whole numbers count.
    - A gradient of zero, also one that underflows, is -inf. float64 (`module.double()`) has room for 300 decades,
      float32 for 38.

    Raises ValueError for a module that cannot be read from left to right or keeps no state, for no tokens, and for an
    entry or a direction that does not fit.
    Source: the product of Jacobians in arXiv 1211.5063, measured as a survey of recurrent networks (1506.00019)
    describes it. Shapes: x (B, T, ...), profile (B, T), float64.

    >>> from tidegate import mixers
    >>> for bias in (0.0, 3.0):
    ...     lstm = mixers.build("lstm", dim=16, forget_bias=bias)
    ...     profile = state_gradient_profile(lstm, torch.randn(4, 41, 16), entries=["c"])
    ...     print(profile.shape, bool((profile[:, 0] < profile[:, -1] - 4).all()))
    torch.Size([4, 41]) True
    torch.Size([4, 41]) False
    """
    for part in module.modules():
        if isinstance(part, Mixer) and (found := {"causality", "streaming"} & set(exceptions_of(part))):
            reason = exceptions_of(part)[min(found)]
            raise ValueError(f"module: {type(part).__name__} cannot be read from left to right: {reason}")
    if x.ndim < 2 or x.shape[1] == 0:
        raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (batch, time >= 1, ...)")
    if state is None:
        dtype = x.dtype if x.is_floating_point() else None
        state = module.init_state(x.shape[0], device=x.device, dtype=dtype)  # type: ignore[operator]
    names = _chosen(module, state, entries)
    before: list[Tensor] = []
    with torch.enable_grad():
        for token in range(x.shape[1]):
            state = state.map(_own)
            leaves = state.tensors()
            before += [leaves[name] for name in names]
            y, state = module(x[:, token : token + 1], state)
        last = y[:, -1] if y.ndim > 2 else y
        if direction is None:
            direction = torch.randn_like(last)
        if direction.shape != last.shape:
            raise ValueError(f"direction: seen shape {tuple(direction.shape)}, wanted {tuple(last.shape)} as y_T")
        gradients = torch.autograd.grad((last * direction).sum(), before, allow_unused=True)
    squares = [_square(gradient, x) for gradient in gradients]
    return torch.stack(squares, 1).unflatten(1, (-1, len(names))).sum(-1).sqrt().log10()


def _chosen(module: nn.Module, state: State, entries: Sequence[str] | None) -> list[str]:
    """Paths of the tensors to look at."""
    known = [name for name, leaf in state.tensors().items() if leaf.is_floating_point() or leaf.is_complex()]
    if not known:
        raise ValueError(f"module: {type(module).__name__} keeps no state that a gradient could flow through")
    if entries is None:
        return known
    for entry in entries:
        if not any(_within(name, entry) for name in known):
            raise ValueError(f"entries: {entry!r} is not in the state of {type(module).__name__}, which has {known}")
    return [name for name in known if any(_within(name, entry) for entry in entries)]


def _within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}/")


def _own(leaf: Tensor) -> Tensor:
    """The same numbers as a node of their own: what one step hands on unchanged must not count for two."""
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_()


def _square(gradient: Tensor | None, x: Tensor) -> Tensor:
    """The squared norm in every row, (B,), in float64, where squares have room."""
    if gradient is None:
        return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    return gradient.reshape(x.shape[0], -1).abs().double().square().sum(1)
