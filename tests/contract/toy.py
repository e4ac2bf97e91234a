"""A small mixer that keeps the contract, and the same mixer broken in every way the suite is to notice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.helpers import Subject
from tidegate.backend import choose
from tidegate.nn.mixer import GROWS, Mixer, accumulation_dtype
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


class Ema(Mixer):
    """A moving average of the current and the previous token, in its quadratic form.

    Equation::

        h_t = a h_{t-1} + W x_t + V x_{t-1},    a = sigmoid(retention)        y_t = U h_t + b
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.current = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.previous = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.retention = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in (self.current, self.previous, self.out):
            part.reset_parameters()
        nn.init.constant_(self.retention, 2.0)

    def state_spec(self) -> dict[str, Any]:
        return {"h": (self.dim,), "tail": ((self.dim,), "input")}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        if segments is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            segments_used = Segments(torch.zeros_like(valid), valid)
        else:
            segments_used = segments
        h, last = self.average(x, state, segments_used)
        y = zero_padding(self.out(h.to(x.dtype)), segments)
        return y, self.remember(State(h=last, tail=self.tail(x, state["tail"], segments_used)))

    # -- what the broken variants replace ------------------------------------------------------------------------------
    def remember(self, state: State) -> State:
        return state

    def past(self, x: Tensor, tail: Tensor, segments: Segments) -> Tensor:
        """x_{t-1}: the previous real token of the same document, the tail, or zeros."""
        index = segments.previous()
        before = x.gather(1, index.clamp(min=0)[..., None].expand_as(x))
        first = torch.where((segments.documents == 0)[..., None], tail[:, None], 0)
        return torch.where((index >= 0)[..., None], before, first)

    def tail(self, x: Tensor, tail: Tensor, segments: Segments) -> Tensor:
        """The last real token, or the tail that came in."""
        time = torch.arange(x.shape[1], device=x.device)
        last = torch.where(segments.valid, time, -1).amax(1)
        found = x.gather(1, last.clamp(min=0)[:, None, None].expand(-1, 1, self.dim)).squeeze(1)
        return torch.where((last >= 0)[:, None], found, tail)

    def average(self, x: Tensor, state: State, segments: Segments) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(x.dtype)
        u = (self.current(x) + self.previous(self.past(x, state["tail"], segments))).to(wide)
        log_a = nn.functional.logsigmoid(self.retention.to(wide))
        count, document = segments.valid.cumsum(1), segments.documents

        def weights(count_t: Tensor, document_t: Tensor) -> Tensor:
            """a^(steps between), zero for what is no real token of the same document."""
            steps = (count_t[:, :, None] - count[:, None, :]).clamp(min=0)
            related = (document_t[:, :, None] == document[:, None, :]) & segments.valid[:, None, :]
            return torch.where(related, torch.exp(log_a * steps), 0)

        def initial(count_t: Tensor, document_t: Tensor) -> Tensor:
            kept = torch.where(document_t == 0, torch.exp(log_a * count_t), 0)
            return kept[..., None] * state["h"][:, None]

        h = self.causal(weights(count, document)) @ u + initial(count, document)
        last = weights(count[:, -1:], document[:, -1:]) @ u + initial(count[:, -1:], document[:, -1:])
        return h, last.squeeze(1)

    def causal(self, weights: Tensor) -> Tensor:
        return weights.tril()


# -- broken: the sequence ----------------------------------------------------------------------------------------------
class LeaksAcrossDocuments(Ema):
    def average(self, x, state, segments):
        return super().average(x, state, Segments(torch.zeros_like(segments.starts), segments.valid))


class WindowLeaks(Ema):
    def past(self, x, tail, segments):
        return super().past(x, tail, Segments(torch.zeros_like(segments.starts), segments.valid))


class KeepsOldDocumentInState(Ema):
    """The outputs are right; the state left behind also holds the document before the last."""

    def average(self, x, state, segments):
        h, _ = super().average(x, state, segments)
        _, last = super().average(x, state, Segments(torch.zeros_like(segments.starts), segments.valid))
        return h, last


class DecaysOnPadding(Ema):
    def average(self, x, state, segments):
        return super().average(x, state, Segments(segments.starts, torch.ones_like(segments.valid)))


class WindowHoldsPadding(Ema):
    def tail(self, x, tail, segments):
        return x[:, -1]


class WritesOnPadding(Ema):
    def forward(self, x, state=None, *, segments=None):
        y, state = super().forward(x, state, segments=segments)
        return y + self.out.bias * 0.1, state


class ReadsPadding(Ema):
    def prepare(self, x, state, segments):
        _, state = super().prepare(x, state, segments)
        return x, state


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1e-3 * gradient


class GradientToPadding(Ema):
    """Values are right, yet padding receives gradient."""

    def forward(self, x, state=None, *, segments=None):
        y, state = super().forward(x, state, segments=segments)
        return y + _Touch.apply(x), state


class PeeksAhead(Ema):
    def causal(self, weights):
        return weights


class PeeksAheadWithinACall(Ema):
    def forward(self, x, state=None, *, segments=None):
        y, state = super().forward(x, state, segments=segments)
        return y + 1e-3 * x.nan_to_num().mean(1, keepdim=True), state


class DependsOnNeighbours(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h - 1e-3 * h.mean(0), last


# -- broken: the state -------------------------------------------------------------------------------------------------
class IgnoresState(Ema):
    def prepare(self, x, state, segments):
        x, state = super().prepare(x, state, segments)
        return x, state.map(torch.zeros_like)


class ForgetsLastToken(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h, h[:, -2] if x.shape[1] > 1 else last


class DetachesState(Ema):
    def remember(self, state):
        return state.detach()


class MutatesState(Ema):
    def forward(self, x, state=None, *, segments=None):
        y, new = super().forward(x, state, segments=segments)
        if state is not None:
            with torch.no_grad():
                state["h"].copy_(new["h"])
        return y, new


class HidesState(Ema):
    """Remembers in the module what belongs into the state."""

    hidden = 0.0

    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        self.hidden = self.hidden + 1e-3
        return h + self.hidden, last


class StateNotByRow(Ema):
    """Row i of the state belongs to row B - 1 - i of the batch: a state that cannot be selected from."""

    def prepare(self, x, state, segments):
        x, state = super().prepare(x, state, segments)
        return x, state.map(lambda t: t.flip(0))

    def remember(self, state):
        return state.map(lambda t: t.flip(0))


class GrowsWithoutSayingSo(Ema):
    def state_spec(self):
        return {**super().state_spec(), "seen": ((GROWS, 1), "input")}

    def forward(self, x, state=None, *, segments=None):
        y, new = super().forward(x, None if state is None else state, segments=segments)
        seen = x.new_zeros(x.shape[0], 0, 1) if state is None else state["seen"]
        return y, State(h=new["h"], tail=new["tail"], seen=torch.cat([seen, x[:, :, :1] * 0], 1))


class StateInHalfPrecision(Ema):
    def remember(self, state):
        return State(h=state["h"].to(state["tail"].dtype), tail=state["tail"])


# -- broken: numbers ---------------------------------------------------------------------------------------------------
class LosesDtype(Ema):
    def forward(self, x, state=None, *, segments=None):
        y, state = super().forward(x, state, segments=segments)
        return y.float() if x.dtype != torch.float64 else y, state


class ComputesInSinglePrecision(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h.float().to(h.dtype), last.float().to(last.dtype)


class Overflows(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h * torch.exp(x) / torch.exp(x), last


class GradientOverflows(Ema):
    """The value is finite; the derivative is 0 * inf."""

    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h + torch.where(x < 80, torch.exp(x), 1.0), last


class Drifts(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h, last.bfloat16().to(last.dtype) if x.dtype == torch.float32 else last


class DependsOnThreads(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h * (1 + 1e-3 * torch.get_num_threads()), last


class BackendsDisagree(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return (h if choose(x) == "parallel" else h * (1 + 1e-4)), last


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2.001 * ctx.saved_tensors[0] * gradient


class WrongGradient(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return _Wrong.apply(h), last


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class KernelDifferentiableOnce(Ema):
    """What is wrong with the fused kernel only."""

    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return _Once.apply(h) if x.dtype == torch.float32 else h * h, last


class DifferentiableOnce(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return _Once.apply(h), last


class DetachedInside(Ema):
    def past(self, x, tail, segments):
        return super().past(x, tail.detach(), segments)


class WrongInHalfPrecision(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h * 1.3 if x.dtype.itemsize == 2 else h, last


class DeadWeight(Ema):
    def past(self, x, tail, segments):
        return torch.zeros_like(x)


class WritesToInput(Ema):
    def forward(self, x, state=None, *, segments=None):
        result = super().forward(x.clone(), state, segments=segments)
        with torch.no_grad():
            x.mul_(0.5)
        return result


class StartsFromOnes(Ema):
    def init_state(self, batch_size, *, device=None, dtype=None):
        return super().init_state(batch_size, device=device, dtype=dtype).map(torch.ones_like)


# -- broken: the module ------------------------------------------------------------------------------------------------
class BranchesOnValues(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return (h if float(x.detach().sum()) > 0 else h + 0.0), last


class BranchesOnLength(Ema):
    def average(self, x, state, segments):
        h, last = super().average(x, state, segments)
        return h * torch.tensor([1.0 for _ in range(x.shape[1])], dtype=h.dtype)[:, None], last


class LeaksWhenSwitched(Ema):
    def __init__(self, dim, *, heads=1, leaky=False, device=None, dtype=None):
        super().__init__(dim, heads=heads, device=device, dtype=dtype)
        self.leaky = leaky

    def average(self, x, state, segments):
        starts = torch.zeros_like(segments.starts) if self.leaky else segments.starts
        return super().average(x, state, Segments(starts, segments.valid))


class ForgetsConfig(Ema):
    def __init__(self, dim, *, heads=1, device=None, dtype=None):
        super().__init__(dim, heads=1, device=device, dtype=dtype)


class IgnoresDtype(Ema):
    def __init__(self, dim, *, heads=1, device=None, dtype=None):
        super().__init__(dim, heads=heads, device=device)


class IgnoresDevice(Ema):
    def __init__(self, dim, *, heads=1, device=None, dtype=None):
        super().__init__(dim, heads=heads, dtype=dtype)


class ResetsHalf(Ema):
    def reset_parameters(self):
        self.current.reset_parameters()


class ConstructionIsNotReset(Ema):
    """What the constructor leaves behind is not what reset_parameters gives."""

    def __init__(self, dim, *, heads=1, device=None, dtype=None):
        super().__init__(dim, heads=heads, device=device, dtype=dtype)
        nn.init.zeros_(self.out.bias)


class NamesNoParameter(Ema):
    no_weight_decay = ("retentoin",)


class NotPicklable(Ema):
    def __init__(self, dim, *, heads=1, device=None, dtype=None):
        super().__init__(dim, heads=heads, device=device, dtype=dtype)
        self.function = lambda x: x


class PositionalOption(Ema):
    def __init__(self, dim, heads, device=None, dtype=None):
        super().__init__(dim, heads=heads, device=device, dtype=dtype)


class TakesAnything(Ema):
    def __init__(self, dim, *, heads=1, headss=1, heads_=1, device=None, dtype=None):
        super().__init__(dim, heads=heads, device=device, dtype=dtype)


class ChecksNothing(Ema):
    def prepare(self, x, state, segments):
        x = zero_padding(x, segments) if isinstance(segments, Segments) else x
        return x, self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state


class WantsARow(Ema):
    def remember(self, state):
        assert state["h"].abs().max() >= 0  # of no numbers there is no largest
        return state


def subject(cls: type[Mixer], **exceptions: str) -> Subject:
    return Subject(cls.__name__, cls, 8, {"heads": 2}, exceptions)
