"""Online function approximation: at every token, the past of a signal as a few coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidegate.nn.hippo import basis, discretise_dense, rule_weight, transition
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.nn.parts import token_shift
from tidegate.ops import scan
from tidegate.ops.loop import over_time
from tidegate.segments import Segments
from tidegate.state import State


class Projection(Mixer):
    """HiPPO as a memory: N coefficients of every channel's past, kept up to date token by token.

    Equation, per channel, A and B of a measure (`tidegate.nn.hippo.transition`)::

        step a number:     x' = A x + B u, discretised at that step: the last 2 / step tokens for "legt" and "fout"
        step None:         x' = (A x + B u) / t, at t = 1, 2, ...: all of the past alike; "legs" only

    - `coefficients, state = project(u)` is called as a mixer is, with state and documents, but its result has an axis
      more. There are no weights to learn; gradients go through.
    - `rule`: "bilinear", "forward", "backward", a number between (`tidegate.nn.hippo.discretise_dense`), or "zoh".
    - `gaps` (B, T) in a call are the times since the token before (of the first, since the beginning), for input at
      irregular times.
    - `reconstruct(coefficients, ages)` gives the signal back.

    With a step, a sequence takes log(T) rounds of products with the matrix's powers. With step None it takes a scan for
    each coefficient, N operations per token: LegS is triangular, so that coefficient n follows a recurrence of its own
    once those before it are known. Where every token has a full matrix of its own, which is step None with the rule
    "zoh" and a step with `gaps`, tokens are walked through one by one.

    Source: HiPPO, arXiv 2008.07669. Shapes: u (B, T, dim), coefficients (B, T, dim, N), N = states.
    State: memory (dim, N); with step None the time elapsed too.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        dim: int,
        *,
        measure: str = "legs",
        states: int = 64,
        step: float | None = None,
        rule: str | float = "bilinear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.measure, self.states, self.step, self.rule = dim, measure, states, step, rule
        A, B = transition(measure, states)
        rule_weight(rule)
        if step is None and measure != "legs":
            raise ValueError(f"step: seen None for {measure!r}, wanted a number; only 'legs' can do without")
        if step is not None and not step > 0:
            raise ValueError(f"step: seen {step}, wanted more than 0, or None for x' = (A x + B u) / t")
        self.register_buffer("A", A.to(device, dtype or torch.get_default_dtype()))
        self.register_buffer("B", B.to(device, dtype or torch.get_default_dtype()))

    def state_spec(self) -> dict[str, Any]:
        memory: dict[str, Any] = {"memory": (self.dim, self.states)}
        return memory if self.step is not None else {**memory, "elapsed": ((), torch.float64)}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segments: Segments | None = None,
        gaps: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        if gaps is not None and gaps.shape != x.shape[:2]:
            raise ValueError(f"gaps: seen shape {tuple(gaps.shape)}, wanted (batch, time) = {tuple(x.shape[:2])}")
        u, memory = x.to(accumulation_dtype(x.dtype)), state["memory"]
        passed = torch.ones_like(u[..., 0], dtype=torch.float64) if gaps is None else gaps.double()
        if self.step is not None:
            if gaps is None:
                y, memory = self._double(u, memory, segments)
            else:
                y, memory = self._walk(u, self.step * passed, memory, segments)
            return y.to(x.dtype), State(memory=memory)
        one = passed.new_ones(1)
        elapsed, end = scan(one, passed[..., None], state=state["elapsed"][:, None], segments=segments)
        share = passed / torch.where(elapsed > 0, elapsed, 1)[..., 0]
        if self.rule == "zoh":
            first = share >= 1
            steps = torch.where(first, torch.inf, -torch.log1p(-torch.where(first, 0, share)))
            y, memory = self._walk(u, steps, memory, segments)
        else:
            y, memory = self._cascade(u, share.to(u.dtype)[..., None], memory, segments)
        return y.to(x.dtype), State(memory=memory, elapsed=end[:, 0])

    def reconstruct(self, coefficients: Tensor, ages: Tensor) -> Tensor:
        """The signal at `ages` (K,) before the token whose coefficients (..., N) these are: (..., K).

        Ages are in tokens. With step None they are shares of the time elapsed: 0 is now, 1 the beginning.

        >>> project = Projection(1, measure="legt", states=16, step=2 / 100)
        >>> coefficients, _ = project(torch.sin(torch.arange(300) / 30).view(1, 300, 1))
        >>> recalled = project.reconstruct(coefficients[0, -1], torch.tensor([20.0, 80.0]))
        >>> bool((recalled - torch.sin(torch.tensor([279.0, 219.0]) / 30)).abs().max() < 0.02)
        True
        """
        ages = -torch.log1p(-ages) if self.step is None else ages * self.step
        return coefficients @ basis(self.measure, self.states, ages).to(coefficients).mT

    # -- three ways through a sequence -------------------------------------------------------------------------------
    def _double(self, u: Tensor, memory: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """One matrix for all tokens: what 2^i tokens before added arrives through its power 2^i."""
        A, B = discretise_dense(self.A.double(), self.B.double(), self.step, self.rule)  # type: ignore[arg-type]
        batch, time = u.shape[:2]
        if segments is None:
            segments = Segments.padded(torch.ones(batch, time, device=u.device))
        before = segments.previous()
        carried = (before < 0) & segments.valid & ~segments.starts  # the first token of what goes on
        x = u[..., None] * B.to(u) + torch.where(carried[..., None, None], (memory @ A.mT.to(u))[:, None], 0)
        reach = 1
        while reach < time:
            x = x + _take(x, before) @ A.mT.to(u)
            before = torch.where(before < 0, before, before.gather(1, before.clamp(min=0)))
            reach, A = 2 * reach, A @ A
        last = torch.where(segments.valid, torch.arange(time, device=u.device), -1).amax(1, keepdim=True)
        return x, torch.where(last[..., None] < 0, memory, _take(x, last)[:, 0])

    def _cascade(self, u: Tensor, share: Tensor, memory: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """LegS at steps of dt / t = `share` (B, T, 1): one scan after the other, each driven by those before it."""
        weight = rule_weight(self.rule)
        assert weight is not None
        total, earlier = torch.zeros_like(u), torch.zeros_like(u)  # sum of r_m x_m over m < n, now and a token ago
        carried = torch.zeros_like(memory[..., 0])  # the same before the first token
        coefficients, last = [], []
        for n, (root, start) in enumerate(zip(self.B.tolist(), memory.unbind(-1), strict=True)):
            scale = 1 / (1 + weight * (n + 1) * share)
            decay = (1 - (1 - weight) * (n + 1) * share) * scale
            drive = u - weight * total - (1 - weight) * earlier
            x, end = scan(decay, root * share * scale * drive, state=start, segments=segments)
            coefficients.append(x)
            last.append(end)
            total, carried = total + root * x, carried + root * start
            earlier, _ = token_shift(total, carried, segments)
        return torch.stack(coefficients, -1), torch.stack(last, -1)

    def _walk(self, u: Tensor, steps: Tensor, memory: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        """A matrix for every token. An infinite step is one after which only the token itself is remembered."""

        def step(carry: tuple[Tensor, ...], u: Tensor, size: Tensor, start: Tensor, real: Tensor) -> Any:
            (kept,) = carry
            endless = size.isinf()
            A, B = discretise_dense(self.A.to(u), self.B.to(u), torch.where(endless, 1, size), self.rule)
            constant = torch.zeros_like(B).index_fill(-1, B.new_zeros(1).long(), 1)  # what a constant 1 is, in LegS
            A, B = torch.where(endless[:, None, None], 0, A), torch.where(endless[:, None], constant, B)
            x = torch.where(start[:, None, None], 0, kept) @ A.mT + u[..., None] * B[:, None]
            return (torch.where(real[:, None, None], x, kept),), torch.where(real[:, None, None], x, 0)

        if segments is None:
            segments = Segments.padded(torch.ones(u.shape[:2], device=u.device))
        steps = torch.where(segments.valid, steps, 1).to(u.dtype)
        (last,), x = over_time(step, (memory,), (u, steps, segments.starts, segments.valid))
        return x, last


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, ...) at the times `index` (B, K), zeros where that is negative."""
    rows = index.clamp(min=0).reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return torch.where((index < 0).reshape(*index.shape, *[1] * (x.ndim - 2)), 0, x.gather(1, rows))
