"""Feedforward sequential memory network: taps along time in place of a recurrence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer
from tidegate.ops import short_convolution
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


@register(
    "fsmn",
    family="convolution",
    paper="recurrent-cells",
    title="Feedforward Sequential Memory Networks: A New Structure to Learn Long-term Dependency",
    arxiv="1512.08301",
    tiny=dict(order=3, stride=2, look_ahead=2, expand=1.5),
    presets={
        "sfsmn": dict(compact=False, skip=False, taps="scalar"),
        "vfsmn": dict(compact=False, skip=False),
        "cfsmn": dict(skip=False),
        "dfsmn": dict(expand=4.0, stride=2),
    },
)
class FSMN(Mixer):
    """Feedforward sequential memory network (FSMN).

    Equation, with a the taps on the `order` tokens before, `stride` apart::

        m_t = sum_{i = 0 .. order} a_i * p_{t - stride i}
        p = V relu(U x + b)             y = x + p + m         compact; without `skip`, y = p + m
        p = x                           y = relu(W x + W' m + b)                      compact=False

    - There is no recurrence: the memory is `order` stride tokens long, and then forgets. taps="vector" has an a_i for
      each channel, "scalar" one for all.
    - compact=False is a layer of the first paper (presets sfsmn, vfsmn). Compact is one of cFSMN and, with `skip`, of
      DFSMN: their hidden layer U, expand * dim wide, and its low-rank projection V come first here and not last, so
      that what goes from layer to layer, and can be skipped to, is the memory.
    - `look_ahead` adds as many taps on later tokens, `look_ahead_stride` apart. A causal layer can only answer late
      then: y_t is what the equation gives for t - delay, delay = look_ahead * look_ahead_stride, with zeros before a
      document's start, and the x of the equation is as late; a document's last answers come if as many tokens follow.

    Initialisation: projections as PyTorch has them, taps uniform in ±(number of taps)^(-1/2).
    Source: arXiv 1512.08301; cFSMN Zhang et al. 2016 (Interspeech); DFSMN 1803.05030. Shapes: x, y (B, T, dim).
    State: memory (order stride + delay, dim), the last p; late (delay, dim), the last x, where it is used.
    """

    no_weight_decay = ("taps_weight",)

    def __init__(
        self,
        dim: int,
        *,
        order: int = 20,
        stride: int = 1,
        look_ahead: int = 0,
        look_ahead_stride: int = 1,
        taps: str = "vector",
        compact: bool = True,
        expand: float = 1.0,
        skip: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.order, self.stride, self.taps, self.compact = dim, order, stride, taps, compact
        self.look_ahead, self.look_ahead_stride, self.expand, self.skip = look_ahead, look_ahead_stride, expand, skip
        for option, least in dict(order=1, stride=1, look_ahead=0, look_ahead_stride=1).items():
            if getattr(self, option) < least:
                raise ValueError(f"{option}: seen {getattr(self, option)}, wanted at least {least}")
        if taps not in ("vector", "scalar"):
            raise ValueError(f"taps: seen {taps!r}, wanted 'vector' or 'scalar'")
        hidden = round(expand * dim)
        if hidden < 1:
            raise ValueError(f"expand: seen {expand}, wanted at least one hidden unit for dim = {dim}")
        self.delay = look_ahead * look_ahead_stride
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if compact:
            self.hidden_proj = nn.Linear(dim, hidden, **factory)
            self.memory_proj = nn.Linear(hidden, dim, bias=False, **factory)
        else:
            self.out_proj = nn.Linear(2 * dim, dim, **factory)  # W and W' side by side
        channels = dim if taps == "vector" else 1
        self.taps_weight = nn.Parameter(torch.empty(channels, order + 1 + look_ahead, **factory))  # oldest first
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        bound = 1 / math.sqrt(self.taps_weight.shape[1])
        nn.init.uniform_(self.taps_weight, -bound, bound)

    def state_spec(self) -> dict[str, Any]:
        spec = {"memory": ((self.order * self.stride + self.delay, self.dim), "input")}
        late = self.delay and (self.skip or not self.compact)
        return {**spec, "late": ((self.delay, self.dim), "input")} if late else spec

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        p = self.memory_proj(functional.relu(self.hidden_proj(x))) if self.compact else x
        memory, tail = short_convolution(p, self._kernel(), state=state["memory"], segments=segments)
        after = {"memory": tail}
        if "late" in state:
            echo = functional.one_hot(torch.zeros((), dtype=torch.int64, device=x.device), self.delay + 1)
            echo = echo.to(x.dtype).expand(self.dim, -1)
            x, after["late"] = short_convolution(x, echo, state=state["late"], segments=segments)
        if not self.compact:
            y = functional.relu(self.out_proj(torch.cat([x, memory], -1)))
            return zero_padding(y, segments), State(after)
        return (x + memory if self.skip else memory), State(after)

    def _kernel(self) -> Tensor:
        """The taps with zeros between them, (dim, W), the last column on the newest token; and p itself, if compact."""
        taps: Tensor = self.taps_weight
        if self.compact:
            taps = taps + functional.one_hot(torch.tensor(self.order, device=taps.device), taps.shape[1]).to(taps.dtype)
        before, after = taps.unsqueeze(-1).split([self.order + 1, self.look_ahead], 1)
        gap = self.stride - 1
        before = functional.pad(before, (gap, 0)).flatten(1)[:, gap:]
        after = functional.pad(after, (self.look_ahead_stride - 1, 0)).flatten(1)
        return torch.cat([before, after], 1).expand(self.dim, -1)
