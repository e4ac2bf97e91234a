"""A linear dynamical system that changes with time, and what it makes of a sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tidegate.segments import Segments


@dataclasses.dataclass(frozen=True)
class Matrices:
    """S_t = transition_t S_{t-1} + input_t v_t,    o_t = readout_t S_t + skip_t v_t + beside_t,    per head.

    S is N x V and empty at the start of every document; v_t is M x V, what a token writes (M is 1 but for several steps
    per token). Where a normaliser divides what is read, `readout` has that in it, and its logarithm is here too.
    With `reads_before`, o_t reads S_{t-1}. With `backwards`, time runs from the right: the last token comes first in
    all of these.
    """

    transition: Tensor  # (B, T, H, 1) a number, (B, T, H, N) a diagonal, or (B, T, H, N, N)
    input: Tensor  # (B, T, H, N, M)
    readout: Tensor  # (B, T, H, N)
    values: Tensor  # (B, T, H, M, V)
    segments: Segments | None = None
    skip: Tensor | None = None  # (B, T, H, M)
    beside: Tensor | None = None  # (B, T, H, V)
    log_normaliser: Tensor | None = None  # (B, T, H)
    reads_before: bool = False
    backwards: bool = False
    keeps_all: bool = False  # a slot for each token, never changed: `readout` is what attends

    def select(self, heads: Any) -> Matrices:
        """Only these heads: whatever indexes an axis and keeps it."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

        def taken(x: Tensor) -> Tensor:
            if constant(x):
                return x[:1, :1, heads].expand(*x.shape[:2], *[-1] * (x.ndim - 2))
            return x[:, :, heads]

        cut: dict[str, Any] = {name: taken(x) if isinstance(x, Tensor) else x for name, x in parts.items()}
        return Matrices(**cut)

    def first(self) -> Tensor:
        """(B, T) where nothing came before, so that a transition acts on nothing, or where there is only padding."""
        batch, time = self.readout.shape[:2]
        if self.segments is not None:
            return self.segments.previous() < 0
        return (torch.arange(time, device=self.readout.device) == 0).expand(batch, time)


def constant(x: Tensor) -> bool:
    """Whether all rows and tokens of x (B, T, ...) share the same memory."""
    return all(size == 1 or stride == 0 for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True))


def multiplied_out(system: Matrices) -> Tensor:
    """(B, H, T, T M): readout transition ... transition input, and skip, of every pair of tokens."""
    batch, time, heads, _, steps = system.input.shape
    if system.keeps_all:
        return system.readout.transpose(1, 2)
    parts = [system.transition, system.input, system.readout]
    if all(map(constant, parts)) and system.segments is None and system.skip is None and not system.reads_before:
        transition, write, readout = (part[0, 0] for part in parts)
        return _of_lags(transition, write, readout, time).expand(batch, -1, -1, -1)
    one = torch.eye(time * steps, dtype=system.values.dtype, device=system.values.device)
    written = one.view(1, time, 1, steps, time * steps).expand(batch, time, heads, steps, time * steps)
    return run(system, written).movedim(1, 2)


def _of_lags(transition: Tensor, write: Tensor, readout: Tensor, time: int) -> Tensor:
    """(H, T, T M) of a system that is the same for all tokens: only the lag counts."""
    kind = torch.promote_types(torch.promote_types(transition.dtype, write.dtype), readout.dtype)
    transition, write, read = transition.to(kind), write.to(kind), readout[:, None].to(kind)  # read (H, 1, N)
    taps = []
    for _ in range(time):
        taps.append((read @ write)[:, 0])
        read = read @ transition if transition.ndim == 3 else read * transition[:, None]
    at = torch.arange(time, device=read.device)
    lag = at[:, None] - at
    phi = torch.stack(taps, 1)[:, lag.clamp(min=0)]  # (H, T, T, M)
    return torch.where((lag >= 0)[..., None], phi, 0).flatten(2)


def run(system: Matrices, values: Tensor | None = None) -> Tensor:
    """o (B, T, H, V) by the equations, token by token; complex where the system or the values are.

    `values` (B, T, H, M, V) take the place of the system's own, and then only what the matrix does is added up, without
    `beside`.
    """
    given = system.values if values is None else values
    starts = valid = None
    if system.segments is not None:
        starts, valid = (flag[..., None, None, None] for flag in (system.segments.starts, system.segments.valid))
    kind = torch.promote_types(system.transition.dtype, given.dtype)
    transition, write, readout = system.transition, system.input, system.readout
    batch, time, heads, states = readout.shape
    S = torch.zeros(batch, heads, states, given.shape[-1], dtype=kind, device=given.device)
    outputs = []
    for t in range(time):
        if starts is not None:
            S = torch.where(starts[:, t], 0, S)
        forget, drive, read = transition[:, t].to(kind), write[:, t].to(kind), readout[:, t, :, None].to(kind)
        moved = forget @ S if transition.ndim == 5 else forget[..., None] * S
        after = moved + drive @ given[:, t].to(kind)
        o = (read @ (S if system.reads_before else after))[:, :, 0]
        if system.skip is not None:
            o = o + (system.skip[:, t, :, None].to(kind) @ given[:, t].to(kind))[:, :, 0]
        if valid is not None:
            o, after = torch.where(valid[:, t, 0], o, 0), torch.where(valid[:, t], after, S)
        S = after
        outputs.append(o)
    o = torch.stack(outputs, 1)
    if values is None and system.beside is not None:
        beside = system.beside if valid is None else torch.where(valid[:, :, 0], system.beside, 0)
        o = o + beside
    return o
